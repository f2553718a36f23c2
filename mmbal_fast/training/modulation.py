"""Methods that turn scores into coefficients and scale gradients in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbal_fast.functional import _checks
from mmbal_fast.functional._derive import derive_
from mmbal_fast.functional._logits import classes_second
from mmbal_fast.functional._modulate import LABEL_OUT_OF_RANGE, NON_FINITE_GRADIENT
from mmbal_fast.functional._observe import observe_
from mmbal_fast.functional._operation import in_graph, without_grad
from mmbal_fast.reference import Statistic
from mmbal_fast.training import ranks
from mmbal_fast.training.amp import as_optimizers, found_inf, unscale_
from mmbal_fast.training.gradients import Gradients
from mmbal_fast.training.method import Method, Record, Setting, integer
from mmbal_fast.training.parameters import ParameterGroups, Parameters, Select

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

_MAX_STEP = 2**63 - 1


@dataclass(frozen=True)
class ModulationRecord(Record):
    """What one step measured and applied, one entry per modality in the order of their names.

    The tensors are views of buffers that the next step overwrites; `clone` keeps them.
    """

    scores: Tensor = field(metadata={"title": "Contribution", "label": "score of the batch"})
    """float32 ``[M]``: what each modality contributes, over all ranks; for OGM-GE the summed
    softmax probability of the true class. Each method says what it is there."""
    ratios: Tensor = field(
        metadata={
            "title": "Discrepancy: above 1 dominates", "label": "ratio", "log": True, "line": 1.0,
        }
    )  # fmt: skip
    """float32 ``[M]``: discrepancy ratios; above 1 for a modality that dominates."""
    coefficients: Tensor = field(
        metadata={
            "title": "What gradients are scaled by", "label": "coefficient", "from": 0.0,
            "line": 1.0,
        }
    )  # fmt: skip
    """float32 ``[M]``: what the gradients were scaled by."""
    skipped: Tensor
    """bool ``[]``: the gradients were not finite, so the `GradScaler` that was given to the step
    skips the optimizer's. False without one."""


class Kernel(NamedTuple):
    """What `functional._observe.observe_` is asked for, and by what `derive_` goes on from there.

    Attributes:
        totals: float32 ``[M + 1]``, sums and the number of samples, for scores that are means.
        past: float32 ``[M]``, what a rule remembers.
        steps: int64 ``[]``, of how many steps.
        statistic: what a sample adds.
        alpha: strength of the rule, or what it has in its place.
        beta: second number of the rule.
        rule: one that the kernels have, or "none".
    """

    totals: Tensor | None = None
    past: Tensor | None = None
    steps: Tensor | None = None
    statistic: Statistic = "probability"
    alpha: float | Tensor = 0.0
    beta: float | Tensor = 1.0
    rule: str = "none"


class GradientModulation(Method):
    """Scales the gradients of each modality by a coefficient, after backward.

    ``g <- k_m g + noise * N(0, std(g))``, between ``loss.backward()`` and ``optimizer.step()``.
    `observe` and `step` are the same for all of its kind. A subclass says what is measured and how
    scores become ratios and coefficients: in `_kernel` by a rule that the kernels have, or in
    `_derive` by operations of PyTorch; and what it remembers of a step, in `_remember`.

    Args:
        modalities: for each of the M >= 2 modalities its encoder: a module, parameters, or named
            parameters. The fusion and the head belong to none. Modules are followed: parameters
            and submodules may be replaced, added and taken away.
        noise: factor of the added noise; 0 for none.
        select: ``(name, parameter) -> bool``, which parameters are modulated; default those of two
            or more dimensions, so no biases and norms, without the tables of ``nn.Embedding``.
            Parameters without names get their position as name.
        seed: 64-bit seed of the noise. Nothing is drawn from torch's generators.
        process_group: whose ranks share their scores, so that all compute the same coefficients;
            default all ranks if torch.distributed is initialised, as in DistributedDataParallel.
            With tensor parallelism give the data-parallel group, or each sample counts once per
            rank that sees it, in the scores but not in the ratios. Made before torch.distributed
            is initialised, the object joins at its first step.
    """

    last: ModulationRecord | None
    noise = Setting(_checks.number)
    """Factor of the noise; 0 for none."""

    _what = "modalities"
    _neutral = 1.0
    """The coefficient of a method that is not enabled."""

    def __init__(
        self,
        modalities: Mapping[str, Parameters] | nn.ModuleDict,
        *,
        noise: float = 0.0,
        select: Select | None = None,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        op = type(self).__name__
        _checks.mapping(op, "modalities", modalities, "encoders")
        super().__init__(modalities.keys(), process_group=process_group)
        self.noise = noise
        self.seed = _checks.word64(op, "seed", seed)
        """64-bit seed of the noise."""
        self._groups = ParameterGroups(op, modalities, select)
        self._pending_scores = False  # observed since the last step
        self._counter = torch.zeros(1, dtype=torch.int64, device="cpu")  # steps done
        self._status = torch.zeros(1, dtype=torch.int32, device="cpu")
        home = self._groups.parameters[0].device
        self._allocate(torch.device("cpu") if home.type == "meta" else home)
        self._join()

    # ---- what a subclass says ------------------------------------------------------------------

    def _kernel(self) -> Kernel:
        """What kernels make of a batch: scores, and ratios and coefficients by a rule they have.

        Here sums of the softmax probability of the true class, and no coefficients.
        """
        return Kernel()

    def _derive(self, *, summed: bool) -> None:
        """Ratios and coefficients, rows 1 and 2 of ``self._rows``, from the scores in row 0.

        On the device, without a host read. Called before the gradients are written, and for scores
        of the user's own: it must not change the memory.

        Args:
            summed: whether the scores changed after the kernel that measured them, as they are the
                sum over ranks now or the user's own.
        """
        if summed:
            totals, past, steps, _, alpha, beta, rule = self._kernel()
            derive_(self._rows, totals, past, steps, True, alpha, beta, rule)

    def _remember(self, counts: Tensor | None) -> None:
        """Takes this step into the memory, if there is one.

        Args:
            counts: bool ``[]``, whether the step counts; None if it does. A `GradScaler` skips it
                otherwise, and it must leave no trace.
        """

    # ---- the step ------------------------------------------------------------------------------

    def observe(
        self,
        logits: Mapping[str, Tensor] | None = None,
        target: Tensor | None = None,
        *,
        ignore_index: int = -100,
        class_dim: int = 1,
        multi_label: bool = False,
        scores: Mapping[str, Tensor | float] | Tensor | None = None,
    ) -> None:
        """Adds a (micro-)batch to the scores of the next `step`.

        Under gradient accumulation call it once per micro-batch, and `step` once per optimizer
        step.

        Args:
            logits: for each modality its own logits ``[B, C]`` or ``[B, C, ...]``; see
                `nn.unimodal_logits` and `nn.masked_logits`. Detached.
            target: class indexes or soft labels, see `functional.contribution_scores`.
            ignore_index: label of samples that count for nothing; default -100.
            class_dim: dimension of the classes in the logits; default 1, as in
                ``torch.nn.functional.cross_entropy``. ``-1`` for token logits ``[B, T, C]``.
            multi_label: whether each class is a label of its own, with a target of 0 and 1 in the
                shape of the logits, see `functional.contribution_scores`; default False.
            scores: instead of logits and target, your own score of each modality, ``[M]`` or by
                name: higher is better. Of several calls the sum counts for methods that compare
                sums, such as `OGMGE`, whose scores must not be negative; else the mean.

        Raises:
            ValueError: missing or unknown modalities, shapes or devices that do not fit together;
                neither logits and target nor scores, or both.
            IndexError: a label out of range, on the CPU; on CUDA it is kept for `check`.
        """
        op = f"{type(self).__name__}.observe"
        if (logits is None) != (target is None) or (logits is None) == (scores is None):
            raise ValueError(
                f"{op}: needs logits and target, or scores alone "
                f"(got logits={_given(logits)}, target={_given(target)}, scores={_given(scores)})"
            )
        if scores is not None:
            self._add_scores(op, scores)
        else:
            assert logits is not None
            assert target is not None
            ordered = _checks.by_name(op, "logits", logits, self.names)
            ordered, target = classes_second(op, ordered, target, class_dim)
            elsewhere = not isinstance(target, Tensor) or target.device != self._rows.device
            if elsewhere or in_graph():  # else the kernels look first
                _checks.batch(op, ordered, target, multi_label=multi_label)
                self._place(target.device)
            totals, past, steps, statistic, alpha, beta, rule = self._kernel()
            observe_(
                self._rows, totals, past, steps, ordered, target, multi_label, ignore_index,
                self._pending_scores, statistic, alpha, beta, rule, self._status,
                op=op,
            )  # fmt: skip
        self._pending_scores = True

    def _add_scores(self, op: str, scores: Mapping[str, Tensor | float] | Tensor) -> None:
        if isinstance(scores, Mapping):
            ordered = _checks.by_name(op, "scores", scores, self.names, "numbers")
            home = next((x.device for x in ordered if isinstance(x, Tensor)), self._rows.device)
            values = torch.stack(
                [torch.as_tensor(x, dtype=torch.float32, device=home).reshape(()) for x in ordered]
            )
        else:
            values = scores
        _checks.vector(op, "scores", values, 2)
        if len(values) != len(self.names):
            raise ValueError(
                f"{op}: scores must be [{len(self.names)}], one for each modality "
                f"(got {list(values.shape)})"
            )
        self._place(values.device)
        self._add(values.detach())

    def _add(self, scores: Tensor) -> None:
        """Adds the user's own scores, floating point ``[M]``, to those since the last step."""
        row = self._rows[0]
        if self._pending_scores:
            row += scores
        else:
            row.copy_(scores)
        self._derive(summed=True)

    def step(
        self,
        logits: Mapping[str, Tensor] | None = None,
        target: Tensor | None = None,
        *,
        ignore_index: int = -100,
        class_dim: int = 1,
        multi_label: bool = False,
        grad_scaler: GradScaler | None = None,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        error_if_nonfinite: bool = False,
    ) -> ModulationRecord:
        """Modulates the gradients in place. Call it after ``backward`` and before the optimizer.

        All ranks of a process group must call it equally often: one all-reduce of M float32, and
        with FSDP2 one of 3 T float64 where noise is added.

        Args:
            logits: as for `observe`, or None if `observe` was called for every micro-batch.
            target: as for `observe`.
            ignore_index: as for `observe`.
            class_dim: as for `observe`.
            multi_label: as for `observe`.
            grad_scaler: scaler whose ``scale`` the loss went through. Its optimizers' gradients are
                unscaled, unless ``grad_scaler.unscale_`` was called before, in the same pass over
                memory where there is one optimizer. A step that the scaler is going to skip does
                not count. Then call ``grad_scaler.step(optimizer)`` as always.
            optimizer: the optimizer, or all of them, that ``grad_scaler`` steps; a wrapper, such as
                Accelerate's, will do.
            error_if_nonfinite: read the gradients' moments back to the host and raise before
                anything is written, and raise for what `check` finds.

        Returns:
            Scores, ratios and coefficients, on the device. While `enabled` is False the gradients
            stay as they are and the coefficients are 1.

        Raises:
            RuntimeError: nothing was observed since the last step; no parameter has a gradient,
                as before ``backward`` (wholly frozen encoders and ranks with empty shards may have
                none); a gradient whose elements share memory; one that a differential-privacy
                optimizer will compute anew; with ``error_if_nonfinite``, a gradient that holds NaN
                or inf.
            ValueError: as for `observe`; only one of ``logits`` and ``target``; logits on the CPU
                with gradients elsewhere; ``grad_scaler`` without ``optimizer`` or with
                ``error_if_nonfinite``.
            TypeError: a gradient that is sparse, complex or integer.
        """
        op = f"{type(self).__name__}.step"
        if (logits is None) != (target is None):
            raise ValueError(f"{op}: logits and target must be given together (got one)")
        scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        optimizers = as_optimizers(op, scaler, optimizer) if scaler is not None else []
        if scaler is not None and error_if_nonfinite:
            raise ValueError(
                f"{op}: error_if_nonfinite must not be set with a grad_scaler, which skips such "
                "steps (got both)"
            )
        given = logits, target, ignore_index, class_dim, multi_label
        if in_graph():  # where gradients would stay switched off after an error
            return self._step(op, given, scaler, optimizers, error_if_nonfinite)
        return without_grad(self._step, op, given, scaler, optimizers, error_if_nonfinite)

    def _step(
        self,
        op: str,
        given: tuple[Mapping[str, Tensor] | None, Tensor | None, int, int, bool],
        scaler: GradScaler | None,
        optimizers: Sequence[Optimizer],
        error_if_nonfinite: bool,
    ) -> ModulationRecord:
        """`step` on checked arguments."""
        logits, target, ignore_index, class_dim, multi_label = given
        if logits is not None:
            self.observe(
                logits,
                target,
                ignore_index=ignore_index,
                class_dim=class_dim,
                multi_label=multi_label,
            )
        if not self._pending_scores:
            raise RuntimeError(
                f"{op}: needs scores, from observe() or from logits and target "
                "(got none since the last step)"
            )
        self._pending_scores = False  # a step that fails must not add its scores to the next one's
        if error_if_nonfinite:
            self.check()
        work = self._sum_scores()
        if self._enabled:
            self._modulate(op, work, scaler, optimizers, error_if_nonfinite)
        else:
            self._finish_scores(work)
            if scaler is not None:
                unscale_(scaler, optimizers)
        counts = None
        if scaler is not None:
            self._skipped.copy_(found_inf(scaler, optimizers, self._skipped.device))
            counts = ~self._skipped
            if self._enabled:
                self._counter.add_(counts)
        if self._enabled:
            self._remember(counts)
        self.last = self._record if scaler is None else self._scaled_record
        return self.last

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
        except Exception:
            self._finish_scores(work)  # the other ranks sum theirs too
            raise
        fused, moments = None, None
        if scaler is not None:
            fused = gradients.unscaled_within(scaler, optimizers, self._rows.device)
        if error_if_nonfinite:
            moments = gradients.moments(self._rows.device)
            gradients.require_finite(moments)
        self._finish_scores(work)
        gradients.scale_(
            self._record.coefficients,
            noise=self._scalar("noise"),
            seed=self.seed,
            step=self._counter,
            moments=moments,
            status=self._status,
            advance=scaler is None,
            unscaling=fused,
        )
        self._scale_shared()

    def _scale_shared(self) -> None:
        """Scales gradients that no single modality owns; they are unscaled by now."""

    def _sum_scores(self) -> dist.Work | None:
        """Starts to sum the scores over the ranks."""
        if self._group is None:
            self._join()
            if self._group is None:
                return None
        work: dist.Work | None = dist.all_reduce(
            self._shared(), group=self._group, async_op=not in_graph()
        )
        return work

    def _shared(self) -> Tensor:
        """What is summed over the ranks."""
        return self._rows[0]

    def _finish_scores(self, work: dist.Work | None) -> None:
        """Ratios and coefficients from the scores, once they are summed."""
        if work is not None:
            work.wait()  # on CUDA the stream waits, not the host
        self._derive(summed=self._group is not None)
        if not self._enabled:
            self._rows[2] = self._neutral

    # ---- what all methods have -----------------------------------------------------------------

    def check(self) -> None:
        """Raises for what the kernels found on the device since the last check. Reads the host.

        Raises:
            IndexError: a label was outside ``[0, C)`` and not ``ignore_index``.
            RuntimeError: a gradient held NaN or inf. It was scaled, without noise.
        """
        op = type(self).__name__
        status = int(self._status.item())
        self._status.zero_()
        if status & LABEL_OUT_OF_RANGE:
            raise IndexError(f"{op}: target must be in [0, C) or ignore_index (got another label)")
        if status & NON_FINITE_GRADIENT:
            raise RuntimeError(f"{op}: gradients must be finite (got NaN or inf in some)")

    def _state(self) -> dict[str, Any]:
        return {"seed": self.seed, "step": int(self._counter.item())}

    def _load(self, op: str, state: Mapping[str, Any]) -> None:
        seed = integer(op, "seed", state["seed"], 0, 2**64 - 1)
        self._counter.fill_(integer(op, "step", state["step"], 0, _MAX_STEP))
        self.seed = seed
        self._forget()

    def _in_sync(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "step": int(self._counter.item()),
            "hash of the parameters' names": ranks.hash_of(self._groups.names),
            "hash of the coefficients": ranks.hash_of(self._rows[2].tolist()),
        }

    def _joined(self, group: ProcessGroup) -> None:
        self.seed = ranks.broadcast_seed(self.seed, group)

    def _forget(self) -> None:
        self._pending_scores = False

    @property
    def _pending(self) -> bool:
        return self._pending_scores

    def _before_training(self) -> None:
        self._groups.look()

    def _before_optimizer(self, scaler: GradScaler | None, optimizer: Optimizer) -> Record | None:
        """Modulates, unless nothing was observed because a batch was left out."""
        if self.last is not None and not self._pending:
            return None
        return self.step(grad_scaler=scaler, optimizer=optimizer)

    def __repr__(self) -> str:
        count = f"; {len(self._groups.parameters)} parameters, "
        return super().__repr__().replace("; ", count, 1)

    def _place(self, device: torch.device) -> None:
        """Has the scores where the logits are."""
        if self._rows.device != device:
            self._allocate(device)
            self._pending_scores = False

    def _allocate(self, device: torch.device) -> None:
        # Scores, ratios, coefficients. Named dtype and device: the defaults may be others.
        self._rows = torch.ones(3, len(self.names), dtype=torch.float32, device=device)
        self._skipped = torch.zeros((), dtype=torch.bool, device=device)
        self._never = torch.zeros((), dtype=torch.bool, device=device)
        self._counter = self._counter.to(device)
        self._status = self._status.to(device)
        self._restore_views()

    def _restore_views(self) -> None:
        scores, ratios, coefficients = self._rows.unbind()
        self._record = ModulationRecord(scores, ratios, coefficients, self._never)
        self._scaled_record = ModulationRecord(scores, ratios, coefficients, self._skipped)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_record"], state["_scaled_record"]
        if self.last is not None:  # which of the two
            state["last"] = self.last is self._scaled_record
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.last is not None:
            self.last = self._scaled_record if self.last else self._record


def _given(value: object) -> str:
    return "None" if value is None else type(value).__name__
