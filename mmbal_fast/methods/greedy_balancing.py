"""Balanced multi-modal learning: which branch must learn alone, decided on the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mmbal_fast.functional import _checks
from mmbal_fast.measures import ConditionalLearningSpeed
from mmbal_fast.measures._branches import Parameters, find_mmtms
from mmbal_fast.training import Method, Record, Setting
from mmbal_fast.training.amp import as_optimizers, found_inf, unscale_
from mmbal_fast.training.method import integer, tensor
from mmbal_fast.training.ranks import hash_of

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


@dataclass(frozen=True)
class GreedyRecord(Record):
    """What one step of `GreedyBalancing` found and decided; tensors on the device."""

    speed: Tensor = field(
        metadata={"title": "Conditional learning speed", "label": "log10 of the ratio"}
    )
    """float64 ``[M]``."""
    difference: Tensor = field(
        metadata={"title": "Each speed minus the mean of the others", "line": 0.0}
    )
    """float64 ``[M]``."""
    branch: Tensor
    """int64 ``[]``, the branch whose gates the next step replaces, -1 for none."""


class GreedyLog(NamedTuple):
    """The last N steps of `GreedyBalancing`, oldest first; tensors on the device.

    Attributes:
        step: int64 ``[N]``, from 1.
        rebalanced: int64 ``[N]``, the branch whose gates were replaced in that step, -1 for none.
        decision: int64 ``[N]``, the branch for which a window starts after that step, -1 for none.
        speed: float64 ``[N, M]``, conditional learning speeds after that step.
    """

    step: Tensor
    rebalanced: Tensor
    decision: Tensor
    speed: Tensor


def _at_least(low: int) -> Any:
    def check(op: str, name: str, value: Any) -> int:
        return integer(op, name, value, low, 2**62)

    return Setting(check)


class GreedyBalancing(Method):
    """Balanced multi-modal learning for a network of branches joined by MMTMs.

    Wu et al., "Characterizing and Overcoming the Greedy Nature of Learning in Multi-modal Deep
    Neural Networks" (ICML 2022), balanced multi-modal learning. `step` goes between ``backward``
    and the optimizer's step and

    1. adds this step's ``mu`` to the `ConditionalLearningSpeed`, unless this was a rebalancing
       step: accumulation pauses meanwhile;
    2. after the warm-up, if one branch's speed exceeds the other's by more than ``epsilon``, opens
       a window of ``window`` rebalancing steps, in which the gates of that branch are replaced by
       their running averages in every MMTM, so that it learns from its own modality only.

    After a window comes at least one regular step. For more than two branches, which the paper
    does not treat, the branch with the largest speed above the mean of the others is chosen; for
    two branches this is the paper's ``|s_0 - s_1| > epsilon``. A step with non-finite gradients
    changes nothing, and undefined speeds (a branch without gradients) start no window.

    All of this happens on the device: `step` never makes the host wait. The loss is the sum of the
    branches' cross-entropies, the prediction the mean of their logits; both are the user's.

    Args:
        model: contains one or more `mmbal_fast.nn.MMTM`; already on its device.
        warmup_steps: number of optimizer steps before the first decision. The paper warms up for
            one epoch: ``len(train_loader)``.
        epsilon: threshold on the difference of speeds; default 0.01, as in the released code.
        window: number of rebalancing steps in a window; default 5, as in the released code.
        branches: the branches' own modules in the order of the MMTMs, see
            `ConditionalLearningSpeed.from_model`. Default: the model's children.
        log_size: number of steps that `log` remembers; ``8 * (M + 3)`` bytes each. Default 4096.
        process_group: whose ranks measure and decide together; default all ranks if
            torch.distributed is initialised. See `ConditionalLearningSpeed`.

    Raises:
        ValueError: ``warmup_steps`` or ``epsilon`` negative or NaN, ``window`` or ``log_size``
            below 1; and what `ConditionalLearningSpeed.from_model` raises.
        TypeError: a number of steps that is not whole.

    Example:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> from mmbal_fast import GreedyBalancing
        >>> from mmbal_fast.nn import MMTM
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.image = torch.nn.ModuleList([torch.nn.Linear(8, 4), torch.nn.Linear(4, 3)])
        ...         self.audio = torch.nn.ModuleList([torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)])
        ...         self.mmtm = MMTM([4, 4])
        ...     def forward(self, image, audio):
        ...         image, audio = self.mmtm(self.image[0](image), self.audio[0](audio))
        ...         return {"image": self.image[1](image), "audio": self.audio[1](audio)}
        >>> model = Net()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> balancing = GreedyBalancing(model, warmup_steps=1)
        >>> target = torch.tensor([0, 1, 2, 0])
        >>> for _ in range(3):
        ...     logits = model(torch.randn(4, 8), torch.randn(4, 5))
        ...     losses = [cross_entropy(each, target) for each in logits.values()]
        ...     optimizer.zero_grad()
        ...     sum(losses).backward()
        ...     record = balancing.step()
        ...     optimizer.step()
        >>> balancing.log.step
        tensor([1, 2, 3])
    """

    last: GreedyRecord | None
    warmup_steps = _at_least(0)
    """Optimizer steps before the first decision."""
    epsilon = Setting(_checks.number)
    """Threshold on the difference of speeds."""
    window = _at_least(1)
    """Rebalancing steps in a window."""

    _what = "branches"

    def __init__(
        self,
        model: nn.Module,
        *,
        warmup_steps: int,
        epsilon: float = 0.01,
        window: int = 5,
        branches: Mapping[str, Parameters] | None = None,
        log_size: int = 4096,
        process_group: ProcessGroup | None = None,
    ) -> None:
        op = "GreedyBalancing"
        self.warmup_steps = warmup_steps
        self.epsilon = epsilon
        self.window = window
        log_size = integer(op, "log_size", log_size, 1, 2**40)
        self.learning_speed = ConditionalLearningSpeed.from_model(
            model, branches, process_group=process_group
        )
        super().__init__(self.learning_speed.names, process_group=process_group)
        self._model = model
        self._mmtms = find_mmtms(model, op)
        device = self.learning_speed.speed.device
        count = len(self.names)
        self._numbers = torch.arange(count, dtype=torch.int64, device=device)
        # Each [1], to be joined to a row of the log.
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._remaining = torch.zeros_like(self._step)
        self._branch = torch.full_like(self._step, -1)
        # A ring with one row more than is remembered: the next step's, which holds nothing yet.
        self._log = torch.zeros(log_size + 1, 3 + count, dtype=torch.float64, device=device)

    def _enabled_changed(self) -> None:
        """Ends an open window too."""
        if not self.enabled:
            self._remaining.zero_()
            self._branch.fill_(-1)
            self._set_gates()

    @torch.no_grad()
    def step(
        self,
        *,
        grad_scaler: GradScaler | None = None,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
    ) -> GreedyRecord:
        """Measure, decide, and set the gates of the next step; see the class.

        Call it once for each optimizer step, after ``backward``, on all ranks.

        Args:
            grad_scaler: scaler whose ``scale`` the loss went through. Its optimizers' gradients are
                unscaled, unless ``grad_scaler.unscale_`` was called before. A step that the scaler
                is going to skip changes nothing. Then call ``grad_scaler.step(optimizer)`` as
                always.
            optimizer: the optimizer, or all of them, that ``grad_scaler`` steps.

        Returns:
            Speeds, differences and the decision, on the device.

        Raises:
            RuntimeError: no parameter has a gradient.
            ValueError: ``grad_scaler`` without ``optimizer``.
        """
        measure = self.learning_speed
        self._follow()
        kept: Tensor | None = None
        if grad_scaler is not None and grad_scaler.is_enabled():
            optimizers = as_optimizers("GreedyBalancing.step", grad_scaler, optimizer)
            unscale_(grad_scaler, optimizers)
            kept = ~found_inf(grad_scaler, optimizers, self._step.device)
        if not self.enabled:
            self.last = GreedyRecord(measure.speed, measure.difference, self._branch[0].clone())
            return self.last
        regular = self._remaining == 0
        finite = measure.update(active=regular[0] if kept is None else regular[0] & kept)
        if kept is not None:
            finite &= kept
        speed = measure.speed
        difference = measure._compared(speed)
        largest, fastest = difference.max(0, keepdim=True)
        row = self._step % len(self._log)  # written again if this step does not count
        self._step.add_(finite)
        start = largest > self.epsilon
        start &= largest < math.inf  # a branch whose speed is undefined is infinitely far away
        start &= self._step > self.warmup_steps
        start &= regular
        start &= finite
        decision = torch.where(start, fastest, -1)
        logged = torch.cat([self._step, self._branch, decision, speed])
        self._log.index_copy_(0, row, logged.unsqueeze(0))
        self._remaining.add_(finite, alpha=-1).clamp_(min=0).masked_fill_(start, self.window)
        torch.maximum(self._branch, decision, out=self._branch)
        self._branch.masked_fill_(self._remaining == 0, -1)
        self._set_gates()
        self.last = GreedyRecord(speed, difference, self._branch[0].clone())
        return self.last

    @property
    def log(self) -> GreedyLog:
        """The last steps, oldest first. Reading it waits for the device, for one number."""
        rows = self._log[self._remembered()]
        rows = rows[max(0, len(rows) - int(self._step)) :]
        step, rebalanced, decision = rows[:, :3].to(torch.int64).unbind(1)
        return GreedyLog(step, rebalanced, decision, rows[:, 3:])

    def _in_sync(self) -> dict[str, int]:
        return {
            "step": int(self._step),
            "steps left of the window": int(self._remaining),
            "branch of the window, from 1": int(self._branch) + 1,
            "hash of the learning speeds": hash_of(self.learning_speed._totals.tolist()),
        }

    def _state(self) -> dict[str, Any]:
        """Sums, counters, the open window, and the log."""
        return {
            "totals": self.learning_speed._totals.clone(),
            "step": self._step.clone(),
            "remaining": self._remaining.clone(),
            "branch": self._branch.clone(),
            "log": self._log[self._remembered()],
        }

    def _load(self, op: str, state: Mapping[str, Any]) -> None:
        """Resumes, and sets the gates of the model's MMTMs as they were."""
        read = {
            name: tensor(op, name, state[name], like)
            for name, like in (
                ("step", self._step), ("remaining", self._remaining), ("branch", self._branch),
            )
        }  # fmt: skip
        integer(op, "step", read["step"], 0, 2**62)
        integer(op, "remaining", read["remaining"], 0, 2**62)
        integer(op, "branch", read["branch"], -1, len(self.names) - 1)
        # Speeds are NaN until every branch has moved.
        log = tensor(op, "log", state["log"], self._log[1:], finite=False)
        self.learning_speed._load_totals(op, state["totals"])
        self._step.copy_(read["step"])
        self._remaining.copy_(read["remaining"])
        self._branch.copy_(read["branch"])
        self._log[self._remembered()] = log
        self._set_gates()

    def _before_training(self) -> None:
        self._follow()

    def _before_optimizer(self, scaler: GradScaler | None, optimizer: Optimizer) -> Record | None:
        return self.step(grad_scaler=scaler, optimizer=optimizer)

    def _remembered(self) -> Tensor:
        """The rows of the log, oldest first: all but the one that the next step writes."""
        size = len(self._log)
        return (
            self._step + torch.arange(1, size, dtype=torch.int64, device=self._log.device)
        ) % size

    def _follow(self) -> None:
        if self.learning_speed._follow():
            self._mmtms = find_mmtms(self._model, "GreedyBalancing")
            device = self.learning_speed._totals.device
            for name in ("_numbers", "_step", "_remaining", "_branch", "_log"):
                setattr(self, name, getattr(self, name).to(device))

    def _set_gates(self) -> None:
        gates = [mmtm.average_gate for mmtm in self._mmtms]
        torch._foreach_copy_(gates, [self._numbers == self._branch] * len(gates))
