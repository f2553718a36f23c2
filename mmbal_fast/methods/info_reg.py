"""InfoReg: information regulation of the modality that has learned enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbal_fast.functional import _checks, _pull
from mmbal_fast.training import ranks
from mmbal_fast.training.amp import unscale_
from mmbal_fast.training.gradients import Gradients
from mmbal_fast.training.means import MeanModulation, mean_of_others
from mmbal_fast.training.method import Setting, tensor
from mmbal_fast.training.parameters import Parameters, Select, every
from mmbal_fast.training.shards import local_part

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

_WINDOW = 10  # epochs that traces are averaged over


class InfoReg(MeanModulation):
    """Holds the dominant encoder near its weights of the epoch's start, while it learns fast.

    ``g <- g + beta_m (theta - theta_0)`` with ``beta_m = c_m exp(tanh(s_m - mean of the others'
    s))`` for the modalities m that are ahead of the others, and 0 for the rest; ``s_m`` is the mean
    softmax probability of the true class. Only in the prime learning window: while the Fisher
    trace of modality m, averaged over ten epochs, grows by more than ``window`` of itself from
    epoch to epoch. Huang et al., "Adaptive Unimodal Regulation for Balanced Multimodal Information
    Acquisition" (CVPR 2025).

    Call `start_epoch` at the start of each epoch. The ``coefficients`` of the record are
    ``beta_m``.

    Args:
        modalities: for each of the M >= 2 modalities its encoder, as for `OGMGE`.
        strengths: ``c_m``: one number, or one for each modality. The authors' code has 0.95 for
            audio and 0.1 for images; default 0.95 for all.
        window: growth of the trace above which a modality is regulated, >= 0; default 0.05, as in
            the authors' code.
        watch: whose trace opens the window of all modalities, ``"audio"`` in the authors' code;
            default each its own.
        select: which parameters are held; default all. Traces are of those of two or more
            dimensions, as in the authors' code.
        process_group: as for `OGMGE`.

    Raises:
        ValueError: as for `OGMGE`; strengths for other modalities, or negative, or ``watch`` that
            is none of them.
        TypeError: as for `OGMGE`.

    Example:
        >>> import torch
        >>> import mmbal_fast
        >>> encoders = torch.nn.ModuleDict({name: torch.nn.Linear(4, 3) for name in ("a", "b")})
        >>> for each in encoders.parameters():
        ...     each.grad = torch.ones_like(each)
        >>> balancer = mmbal_fast.InfoReg(encoders)
        >>> balancer.start_epoch()
        >>> balancer.observe(scores={"a": 1.0, "b": 0.0})
        >>> balancer.step().coefficients
        tensor([2.0346, 0.0000])
    """

    window = Setting(_checks.number)
    """Growth of the trace above which a modality is regulated."""

    _neutral = 0.0

    def __init__(
        self,
        modalities: Mapping[str, Parameters] | nn.ModuleDict,
        *,
        strengths: Mapping[str, float] | float = 0.95,
        window: float = 0.05,
        watch: str | None = None,
        select: Select | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.window = window
        super().__init__(modalities, select=select or every, process_group=process_group)
        op = type(self).__name__
        if not isinstance(strengths, Mapping):
            strengths = dict.fromkeys(self.names, strengths)
        given = _checks.by_name(op, "strengths", strengths, self.names, "numbers")
        if watch is not None and watch not in self.names:
            raise ValueError(f"{op}: watch must be one of {list(self.names)} (got {watch!r})")
        self.strengths = {
            name: _checks.number(op, "strengths", value)
            for name, value in zip(self.names, given, strict=True)
        }
        """``c_m`` of each modality."""
        self.watch = watch
        """Whose trace opens the window of all; None for each its own."""
        self._constants = torch.tensor(
            list(self.strengths.values()), dtype=torch.float32, device="cpu"
        )
        self._anchors: list[Tensor] = []
        self._shares: Tensor | None = None  # of squares in traces

    @torch.no_grad()
    def start_epoch(self) -> None:
        """Keeps the weights that this epoch's are held near, and closes the last epoch's trace.

        Costs one copy of the encoders, which is made anew each epoch in the same memory.
        """
        self._groups.follow()
        weights = self._weights()
        if [each.shape for each in self._anchors] == [each.shape for each in weights]:
            torch._foreach_copy_(self._anchors, weights)
        else:
            self._anchors = [each.clone() for each in weights]
            self._shares = None
        memory = self._memory
        started = memory["epochs"] > 0
        closed = torch.cat([memory["traces"][1:], memory["trace"].unsqueeze(0)])
        memory["traces"].copy_(torch.where(started, closed, memory["traces"]))
        memory["trace"].zero_()
        memory["epochs"].add_(1)

    # ---- the rule ------------------------------------------------------------------------------

    def _derive_from_means(self) -> None:
        scores, ratios, coefficients = self._rows
        others = mean_of_others(scores)
        torch.div(scores, others, out=ratios)
        lead = scores - others
        self._constants = self._constants.to(scores.device)
        beta = self._constants * torch.exp(torch.tanh(lead))
        coefficients.copy_(torch.where((lead > 0) & self._in_window(), beta, 0.0))

    def _in_window(self) -> Tensor:
        """Which modalities still learn fast, bool ``[M]``; all do in the first epoch."""
        traces = self._memory["traces"]
        now, before = traces[1:].mean(0), traces[:-1].mean(0)
        open_ = ((now - before) / now > self._scalar("window")) | (self._memory["epochs"] <= 1)
        if self.watch is None:
            return open_
        return open_[self.names.index(self.watch)].expand(len(self.names))

    def _blank_memory(self) -> dict[str, Tensor]:
        count = len(self.names)
        return {
            "epochs": torch.zeros((), dtype=torch.int64, device="cpu"),
            "trace": torch.zeros(count, dtype=torch.float64, device="cpu"),
            "traces": torch.zeros(_WINDOW + 1, count, dtype=torch.float64, device="cpu"),
        }

    def _recall(self) -> dict[str, Tensor]:
        return {"trace": self._memory["trace"] + self._step_trace}

    # ---- the gradients -------------------------------------------------------------------------

    def _modulate(
        self,
        op: str,
        work: dist.Work | None,
        scaler: GradScaler | None,
        optimizers: Sequence[Optimizer],
        error_if_nonfinite: bool,
    ) -> None:
        try:
            gradients = Gradients(op, self._groups)
            anchors = self._checked_anchors(op)
        except Exception:
            self._finish_scores(work)  # the other ranks sum theirs too
            raise
        if scaler is not None:
            unscale_(scaler, optimizers)
        device = self._rows.device
        if error_if_nonfinite:
            gradients.require_finite(gradients.moments(device))
        self._finish_scores(work)
        groups = self._groups
        squares = _pull.operation(
            groups.gradients(),
            self._weights(),
            anchors,
            self._rows[2],
            groups.owners,
            names=groups.names,
        ).to(device)
        if groups.shards is not None:
            groups.shards.sum_(squares)
        shares = self._shares_of_traces(device)
        self._step_trace = torch.where(shares > 0, shares * squares, 0.0).sum(1)
        if scaler is None:
            self._counter.add_(1)

    def _checked_anchors(self, op: str) -> list[Tensor]:
        weights = self._weights()
        if not self._anchors:
            raise RuntimeError(f"{op}: needs start_epoch() first (got no weights to hold near)")
        if [each.shape for each in self._anchors] != [each.shape for each in weights]:
            raise RuntimeError(
                f"{op}: parameters must be those of start_epoch() "
                f"(got {len(weights)} of other shapes than its {len(self._anchors)})"
            )
        if self._anchors[0].device != weights[0].device:
            self._anchors = [each.to(weights[0].device) for each in self._anchors]
        return self._anchors

    def _weights(self) -> list[Tensor]:
        """This rank's elements of all selected parameters."""
        return [local_part(each).detach() for each in self._groups.parameters]

    def _shares_of_traces(self, device: torch.device) -> Tensor:
        """What a modality's trace has of a parameter's sum of squares, float64 ``[M, T]``.

        1 over the number of elements, of the whole tensor; 0 for those of others and of less than
        two dimensions.
        """
        if self._shares is None or self._shares.device != device:
            groups = self._groups
            shares = torch.zeros(
                len(self.names), len(groups.owners), dtype=torch.float64, device="cpu"
            )
            for index, (owner, each) in enumerate(
                zip(groups.owners, groups.parameters, strict=True)
            ):
                if each.ndim >= 2 and each.numel() > 0:
                    shares[owner, index] = 1.0 / each.numel()
            self._shares = shares.to(device)
        return self._shares

    # ---- state ---------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "anchors": [each.clone() for each in self._anchors]}

    def _load(self, op: str, state: Mapping[str, Any]) -> None:
        given, weights = state["anchors"], self._weights()
        if not isinstance(given, list | tuple):
            raise TypeError(f"{op}: anchors must be a list of tensors (got {given!r})")
        if len(given) not in (0, len(weights)):
            raise ValueError(
                f"{op}: anchors must be none or {len(weights)}, one for each parameter "
                f"(got {len(given)})"
            )
        anchors = [
            tensor(op, "anchors", each, like, finite=False)
            for each, like in zip(given, weights, strict=False)
        ]
        super()._load(op, {name: state[name] for name in state if name != "anchors"})
        self._anchors = anchors

    def _in_sync(self) -> dict[str, int]:
        return {
            **super()._in_sync(),
            "hash of strengths and watch": ranks.hash_of(self.strengths, self.watch),
            "hash of the traces": ranks.hash_of(self._memory["traces"].tolist()),
        }
