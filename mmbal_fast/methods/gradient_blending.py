"""Gradient-Blending: weigh each head's loss by what it gains and how it overfits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmbal_fast import functional
from mmbal_fast.functional._blending_weights import check_floor
from mmbal_fast.nn._pool import log_linear_pool, log_probabilities
from mmbal_fast.reference._blending import FLOOR, increments
from mmbal_fast.training import LossWeighting, Setting, WeightingRecord
from mmbal_fast.training.method import tensor
from mmbal_fast.training.weighting import as_losses

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.distributed import ProcessGroup

Split = Literal["train", "validation"]
_SPLITS: tuple[Split, Split] = ("train", "validation")


class SuperEpoch(NamedTuple):
    """What `GradientBlending.update` measured and decided; float64 ``[K]`` on the CPU.

    Attributes:
        train: mean loss of each head over the samples of the training set.
        validation: the same over the held-out samples.
        generalization: ``dG``, fall of the validation loss since the measurement before; NaN in the
            first measurement, as are the next two.
        overfitting: ``dO``, growth of the gap between validation and training loss since then.
        ratio: the overfitting-to-generalization ratio ``|dO / dG|``.
        weights: weights from now on.
    """

    train: Tensor
    validation: Tensor
    generalization: Tensor
    overfitting: Tensor
    ratio: Tensor
    weights: Tensor


def _floor(op: str, name: str, value: Any) -> float:
    check_floor(op, value)
    return float(value)


class GradientBlending(LossWeighting):
    """Gradient-Blending: ``sum_k w_k L_k`` over all heads, with weights that are measured.

    Wang, Tran, Feiszli, "What Makes Training Multi-Modal Classification Networks Hard?"
    (CVPR 2020). A head is a modality's own classifier or the fused one. *Offline* (section 3.3,
    algorithm 1): pass the weights of `estimate_blending_weights` and call `loss`, nothing else.
    *Online*: every few epochs, a super-epoch, measure all heads on the training set and on samples
    held out from it (never the test set), `record` the losses, and call `update`. The weights stay
    as they are, uniform, until there are two measurements to compare. So the first super-epoch is a
    warm-up that no weight depends on, unless the untrained model is measured too.

    Against the paper's online variant, which trains a copy of the model for each head in every
    super-epoch, this one compares the measurements of the joint training, at no cost but them. A
    head that gets weight 0 no longer trains on its own loss, and so may stay at 0; to follow the
    paper, assign `weights` from `estimate_blending_weights` at every super-epoch instead of calling
    `update`.

    Across processes `update` sums the records of all ranks, in one all-reduce of 2K + 2 numbers, so
    that all have the same weights; each rank records its own share of the samples.

    Args:
        heads: names of the K >= 2 heads.
        weights: ``[K]``, the weights to begin with: not negative, not all 0. Default uniform.
        floor: see `mmbal_fast.functional.blending_weights`; default 0.1.
        label_smoothing: of `loss`, 0 to 1; default 0.
        ignore_index: label of samples that `loss` leaves out; default -100.
        process_group: whose ranks are summed. Default: all of them if torch.distributed is
            initialised, as in `OGMGE`.

    Attributes:
        history: a `SuperEpoch` for each `update`, oldest first.

    Raises:
        ValueError: fewer than two heads, a name given twice, weights of another length, negative,
            not finite or all 0, or ``floor`` or ``label_smoothing`` out of range.
        TypeError: ``heads`` is text instead of names.

    Example:
        >>> import torch
        >>> from mmbal_fast import GradientBlending
        >>> blending = GradientBlending(["audio", "fused"])
        >>> logits = {"audio": torch.zeros(4, 2), "fused": torch.zeros(4, 2)}
        >>> blending.loss(logits, torch.tensor([0, 1, 1, 0]))
        tensor(0.6931)
        >>> def measured(train, validation):
        ...     blending.record("train", train, samples=900)
        ...     blending.record("validation", validation, samples=100)
        ...     return blending.update()
        >>> measured({"audio": 1.0, "fused": 1.0}, {"audio": 1.0, "fused": 1.0}).weights
        tensor([0.5000, 0.5000], dtype=torch.float64)
        >>> # dG = 0.5 for both, dO = 0.1 and 0.2
        >>> measured({"audio": 0.4, "fused": 0.3}, {"audio": 0.5, "fused": 0.5}).weights
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """

    history: list[SuperEpoch]
    floor = Setting(_floor)
    """Of `functional.blending_weights`."""

    def __init__(
        self,
        heads: Sequence[str],
        *,
        weights: Tensor | Sequence[float] | None = None,
        floor: float = FLOOR,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            heads,
            weights=weights,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            process_group=process_group,
        )
        self.floor = floor
        self.history = []
        self._sums: dict[Split, Tensor] = {}

    def predict(self, logits: Mapping[str, Tensor | None]) -> Tensor:
        """The prediction of all heads together: ``log softmax sum_k w_k log p_k``.

        Needs nothing beyond the weights, but these have to come from validation data that look like
        the target. A head of weight 0 was not trained, the fused one included: predicting from it
        alone is at chance where the weighted heads are not. See `mmbal_fast.fusion.LogLinearPool`
        for weights that are fitted to the prediction itself.

        Args:
            logits: ``[B, C]`` or ``[B, C, ...]`` for each head, or None where one is missing.

        Returns:
            Log-probabilities of the same shape, at least float32.

        Raises:
            ValueError: a head is unknown or not named, no logits at all, or different shapes.
            TypeError: logits that are no floating point tensors.

        Example:
            >>> import torch
            >>> from mmbal_fast import GradientBlending
            >>> blending = GradientBlending(["audio", "fused"], weights=[1.0, 0.0])
            >>> audio, fused = torch.tensor([[0.0, 1.0]]), torch.tensor([[9.0, 0.0]])
            >>> blending.predict({"audio": audio, "fused": fused}).argmax(dim=1)
            tensor([1])
        """
        log_probs = log_probabilities(f"{type(self).__name__}.predict", self.names, logits)
        device = next(each.device for each in log_probs if each is not None)
        return log_linear_pool(log_probs, self._weights.to(device))

    def record(
        self,
        split: Split,
        losses: WeightingRecord | Mapping[str, Tensor | float] | Tensor | Sequence[float],
        samples: Tensor | int | None = None,
    ) -> None:
        """Add the losses of a batch to the current measurement of a split.

        Means are taken over samples, so that batches may differ in size. A batch in which no sample
        counts adds nothing. No host read.

        Args:
            split: ``"train"`` or ``"validation"``.
            losses: `last`, or the mean loss of each head over the batch, ``[K]`` or by name.
            samples: how many samples these are the means of; `last` has that in itself.

        Raises:
            ValueError: an unknown split; a head missing or unknown; losses of another length; a
                number of samples that is missing, given twice or negative.

        Example:
            >>> import torch
            >>> from mmbal_fast import GradientBlending
            >>> blending = GradientBlending(["audio", "fused"])
            >>> batches = [(torch.zeros(3, 2), torch.tensor([0, 1, 1]))]
            >>> with torch.no_grad():
            ...     for x, target in batches:
            ...         blending.loss({"audio": x, "fused": x}, target)
            ...         blending.record("validation", blending.last)
            tensor(0.6931)
        """
        op = "GradientBlending.record"
        if split not in _SPLITS:
            raise ValueError(f"{op}: split must be 'train' or 'validation' (got {split!r})")
        if isinstance(losses, WeightingRecord):
            if samples is not None:
                raise ValueError(f"{op}: a record has its own samples (got {samples} beside it)")
            record = losses
            losses, samples = record.losses, record.samples
        if samples is None:
            raise ValueError(f"{op}: the number of samples is needed (got None)")
        if isinstance(samples, int) and samples < 0:
            raise ValueError(f"{op}: samples must not be negative (got {samples})")
        values = as_losses(op, self.names, losses)
        number = torch.as_tensor(samples, dtype=torch.float64, device=values.device)
        # Not by multiplication alone: the mean over no samples is NaN.
        total = torch.where(number > 0, values * number, 0.0)
        added = torch.cat([total, number.reshape(1)])
        if split in self._sums:
            added = self._sums[split].to(added.device) + added
        self._sums[split] = added

    def update(self) -> SuperEpoch:
        """End a super-epoch: turn what was recorded into new weights.

        A collective call, if there are several ranks. Reads the device once.

        Returns:
            The measurement, which is also appended to ``history``. The weights change in place, so
            that a captured CUDA graph sees them.

        Warns:
            RuntimeWarning: no head gained, so that the weights are uniform.

        Raises:
            ValueError: a split has no records on any rank. Nothing changes then.
        """
        device = next(iter(self._sums.values()), self._weights).device
        none = torch.zeros(len(self.names) + 1, dtype=torch.float64, device=device)
        sums = torch.stack([self._sums.get(split, none).to(device) for split in _SPLITS])
        self._join()
        if self._group is not None:
            dist.all_reduce(sums, group=self._group)
        sums = sums.cpu()
        samples = sums[:, -1:]
        for split, each in zip(_SPLITS, samples, strict=True):
            if not each > 0:
                raise ValueError(
                    f"GradientBlending.update: losses on both splits must be recorded first "
                    f"(got none for {split!r})"
                )
        train, validation = (sums[:, :-1] / samples).unbind()
        measured = self._compared(train, validation)
        self._weights.copy_(measured.weights)
        self._sums = {}
        self.history.append(measured)
        return measured

    def _compared(self, train: Tensor, validation: Tensor) -> SuperEpoch:
        if not self.history:
            unknown = torch.full_like(train, math.nan)
            weights = self._weights.cpu().clone()
            return SuperEpoch(train, validation, unknown, unknown, unknown, weights)
        before = self.history[-1]
        losses = before.train, before.validation, train, validation
        return SuperEpoch(
            train,
            validation,
            *increments(*losses),
            functional.overfitting_to_generalization_ratio(*losses),
            functional.blending_weights(*losses, floor=self.floor),
        )

    def plot(self) -> Figure:
        """Draw the OGR and the weights of each head over the super-epochs.

        Returns:
            A matplotlib figure; ``figure.savefig("blending.png")`` writes it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharex=True)
        epochs = range(len(self.history))
        for k, name in enumerate(self.names):
            left.plot(epochs, [each.ratio[k].item() for each in self.history], "o-", label=name)
            right.plot(epochs, [each.weights[k].item() for each in self.history], "o-", label=name)
        left.set(xlabel="measurement", ylabel="OGR, |dO / dG|", yscale="log")
        right.set(xlabel="measurement", ylabel="weight", ylim=(-0.02, 1.02))
        right.legend()
        return figure

    def _state(self) -> dict[str, Any]:
        """Plain numbers: weights, history and what was recorded since the last `update`.

        The records are this rank's own: with several ranks, save right after `update`. Then the
        state is the same on all of them and fits any number of ranks.
        """
        return {
            **super()._state(),
            "history": [[values.tolist() for values in each] for each in self.history],
            "sums": {split: each.tolist() for split, each in self._sums.items()},
        }

    def _load(self, op: str, state: Mapping[str, Any]) -> None:
        like = torch.empty(len(self.names), dtype=torch.float64, device="cpu")
        history = []
        for measurement in _listed(op, "history", state["history"]):
            rows = _listed(op, "a measurement of the history", measurement)
            if len(rows) != len(SuperEpoch._fields):
                raise ValueError(
                    f"{op}: a measurement must have {', '.join(SuperEpoch._fields)} "
                    f"(got {len(rows)} rows)"
                )
            # The first measurement has nothing to compare with, and losses may diverge: NaN.
            history.append(
                SuperEpoch(*(tensor(op, "history", each, like, finite=False) for each in rows))
            )
        sums, more = state["sums"], torch.cat([like, like[:1]])
        if not isinstance(sums, Mapping) or not set(sums) <= set(_SPLITS):
            raise ValueError(f"{op}: sums must be of {' and '.join(_SPLITS)} (got {sums!r})")
        recorded = {
            split: tensor(op, "sums", sums[split], more) for split in _SPLITS if split in sums
        }
        super()._load(op, state)
        self.history, self._sums = history, recorded

    def _forget(self) -> None:
        self._sums = {}

    def _in_sync(self) -> dict[str, int]:
        return super()._in_sync() | {"measurements": len(self.history)}

    def _after_validation(self) -> None:
        """Ends a super-epoch where training and validation were recorded."""
        if len(self._sums) == len(_SPLITS):
            self.update()


def _listed(op: str, name: str, value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{op}: {name} must be a list (got {value!r})")
    return value
