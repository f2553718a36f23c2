"""Gradient-Blending: weigh each head's loss by what it gains and how it overfits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmbal_fast import functional
from mmbal_fast.functional._blended_cross_entropy import blend, check_label_smoothing
from mmbal_fast.functional._blending_weights import check_floor
from mmbal_fast.methods._distributed import resolve_group
from mmbal_fast.reference._blending import FLOOR, increments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Split = Literal["train", "validation"]
_SPLITS: tuple[Split, Split] = ("train", "validation")


class HeadLosses(NamedTuple):
    """Losses of a batch, tensors on its device.

    Attributes:
        losses: float32 or float64 ``[K]``, detached: each head's mean over the samples that count.
        samples: int64 ``[]``, the number of samples that count.
    """

    losses: Tensor
    samples: Tensor


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


class GradientBlending:
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
        head_names: names of the heads, in the order of all ``[K]``.
        history: a `SuperEpoch` for each `update`, oldest first.
        last: the `HeadLosses` of the last call of `loss`, None before it.

    Raises:
        ValueError: fewer than two heads, a name given twice, weights of another length, negative,
            not finite or all 0, or ``floor`` or ``label_smoothing`` out of range.

    Example:
        >>> import torch
        >>> from mmbal_fast.methods import GradientBlending
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

    head_names: tuple[str, ...]
    history: list[SuperEpoch]
    last: HeadLosses | None

    def __init__(
        self,
        heads: Sequence[str],
        *,
        weights: Tensor | Sequence[float] | None = None,
        floor: float = FLOOR,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """See the class."""
        self.head_names = checked_heads("GradientBlending", heads)
        check_floor("GradientBlending", floor)
        check_label_smoothing("GradientBlending", label_smoothing)
        self.floor = floor
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.process_group = process_group
        self.history = []
        self.last = None
        count = len(self.head_names)
        self._weights = torch.full((count,), 1.0 / count, dtype=torch.float64)
        if weights is not None:
            self.weights = weights
        self._sums: dict[Split, Tensor] = {}

    @property
    def weights(self) -> Tensor:
        """Weight of each head, float64 ``[K]``; assign to set them."""
        return self._weights.clone()

    @weights.setter
    def weights(self, weights: Tensor | Sequence[float]) -> None:
        values = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
        if values.shape != (len(self.head_names),):
            raise ValueError(
                f"GradientBlending: weights must be [{len(self.head_names)}], one for each head "
                f"(got {list(values.shape)})"
            )
        if not (values.isfinite().all() and (values >= 0).all() and values.any()):
            raise ValueError(
                "GradientBlending: weights must be finite and not negative, one of them positive "
                f"(got {values.tolist()})"
            )
        self._weights.copy_(values)

    def loss(self, logits: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """The blended loss ``sum_k w_k CE(logits_k, target)``, to be differentiated.

        Leaves each head's own loss in `last`. See `mmbal_fast.functional.blended_cross_entropy`;
        no host read.

        Args:
            logits: ``[B, C]`` or ``[B, C, ...]`` for each head.
            target: class indexes ``[B]`` or ``[B, ...]``, or soft labels shaped like the logits.

        Returns:
            A scalar, float64 if any of the logits is, float32 otherwise.

        Raises:
            ValueError: a head is missing or unknown, and as ``blended_cross_entropy`` does.
            TypeError: as ``blended_cross_entropy`` does.
            IndexError: as ``blended_cross_entropy`` does.
        """
        if set(logits) != set(self.head_names):
            raise ValueError(
                f"GradientBlending.loss: logits must name the heads {list(self.head_names)} "
                f"(got {list(logits)})"
            )
        ordered = [logits[name] for name in self.head_names]
        self._move(ordered[0].device)
        loss, per_head, samples = blend(
            ordered,
            target,
            self._weights,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )
        self.last = HeadLosses(per_head, samples)
        return loss

    def record(
        self,
        split: Split,
        losses: HeadLosses | Mapping[str, Tensor | float] | Tensor | Sequence[float],
        samples: Tensor | int | None = None,
    ) -> None:
        """Add the losses of a batch to the current measurement of a split.

        Means are taken over samples, so that batches may differ in size. A batch in which no sample
        counts adds nothing. No host read.

        Args:
            split: ``"train"`` or ``"validation"``.
            losses: `last`, or the mean loss of each head over the batch, ``[K]`` or by name.
            samples: how many samples these are the means of; `HeadLosses` has that in itself.

        Raises:
            ValueError: an unknown split; a head missing or unknown; losses of another length; a
                number of samples that is missing, given twice or negative.

        Example:
            >>> import torch
            >>> from mmbal_fast.methods import GradientBlending
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
        if isinstance(losses, HeadLosses):
            if samples is not None:
                raise ValueError(f"{op}: HeadLosses has its own samples (got {samples} beside it)")
            losses, samples = losses
        if samples is None:
            raise ValueError(f"{op}: the number of samples is needed (got None)")
        if isinstance(samples, int) and samples < 0:
            raise ValueError(f"{op}: samples must not be negative (got {samples})")
        values = as_losses(op, self.head_names, losses)
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
            The measurement, which is also appended to `history`. The weights change in place, so
            that a captured CUDA graph sees them.

        Warns:
            RuntimeWarning: no head gained, so that the weights are uniform.

        Raises:
            ValueError: a split has no records on any rank. Nothing changes then.
        """
        device = next(iter(self._sums.values()), self._weights).device
        none = torch.zeros(len(self.head_names) + 1, dtype=torch.float64, device=device)
        sums = torch.stack([self._sums.get(split, none).to(device) for split in _SPLITS])
        group = resolve_group(self.process_group)
        if group is not None:
            dist.all_reduce(sums, group=group)
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
        for k, name in enumerate(self.head_names):
            left.plot(epochs, [each.ratio[k].item() for each in self.history], "o-", label=name)
            right.plot(epochs, [each.weights[k].item() for each in self.history], "o-", label=name)
        left.set(xlabel="measurement", ylabel="OGR, |dO / dG|", yscale="log")
        right.set(xlabel="measurement", ylabel="weight", ylim=(-0.02, 1.02))
        right.legend()
        return figure

    def state_dict(self) -> dict[str, Any]:
        """Weights, history and what was recorded since the last `update`, as plain numbers.

        The records are this rank's own: with several ranks, save right after `update`. Then the
        state is the same on all of them and fits any number of ranks. Reads the device.
        """
        return {
            "heads": list(self.head_names),
            "weights": self._weights.tolist(),
            "history": [[values.tolist() for values in each] for each in self.history],
            "sums": {split: each.tolist() for split, each in self._sums.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, bit for bit.

        Raises:
            ValueError: the state is of other heads.
        """
        if tuple(state_dict["heads"]) != self.head_names:
            raise ValueError(
                f"GradientBlending.load_state_dict: the heads must be {list(self.head_names)} "
                f"(got {list(state_dict['heads'])})"
            )
        self._weights.copy_(_float64(state_dict["weights"]))
        self.history = [SuperEpoch(*map(_float64, each)) for each in state_dict["history"]]
        self._sums = {split: _float64(each) for split, each in state_dict["sums"].items()}

    def _move(self, device: torch.device) -> None:
        if self._weights.device != device:
            # A tensor made in inference mode could never be saved for a backward pass.
            with torch.inference_mode(False):
                self._weights = self._weights.to(device)


def checked_heads(op: str, heads: Sequence[str]) -> tuple[str, ...]:
    """The names of at least two heads, each given once."""
    if len(heads) < 2:
        raise ValueError(f"{op}: there must be at least 2 heads (got {list(heads)})")
    if len(set(heads)) < len(heads):
        raise ValueError(f"{op}: the heads must differ in name (got {list(heads)})")
    return tuple(heads)


def as_losses(
    op: str,
    heads: Sequence[str],
    losses: Mapping[str, Tensor | float] | Tensor | Sequence[float],
) -> Tensor:
    """Losses of the heads, given by name or in order, as float64 ``[K]``, detached."""
    if isinstance(losses, Mapping):
        if set(losses) != set(heads):
            raise ValueError(f"{op}: losses must name the heads {list(heads)} (got {list(losses)})")
        values = torch.stack([torch.as_tensor(losses[name]).double() for name in heads])
    else:
        values = torch.as_tensor(losses, dtype=torch.float64)
    if values.shape != (len(heads),):
        raise ValueError(f"{op}: losses must be [{len(heads)}] (got {list(values.shape)})")
    return values.detach()


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
