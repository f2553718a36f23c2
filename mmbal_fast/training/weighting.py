"""Methods that weigh the losses of several heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmbal_fast.functional import _checks
from mmbal_fast.functional._blended_cross_entropy import blend, check_label_smoothing
from mmbal_fast.functional._logits import classes_second
from mmbal_fast.training.method import Method, Record, Setting, integer, tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class WeightingRecord(Record):
    """Losses and weights of a batch, one entry per head in the order of their names."""

    losses: Tensor = field(metadata={"title": "Losses", "label": "loss of the batch", "from": 0.0})
    """float32 or float64 ``[K]``, detached: each head's mean over the samples that count."""
    weights: Tensor = field(metadata={"title": "Weights", "label": "weight", "from": 0.0})
    """float64 ``[K]``: what the losses were weighed by."""
    samples: Tensor
    """int64 ``[]``: the number of samples that count."""


def _label_smoothing(op: str, name: str, value: Any) -> float:
    check_label_smoothing(op, value)
    return float(value)


def _ignore_index(op: str, name: str, value: Any) -> int:
    return integer(op, name, value, -(2**63), 2**63 - 1)


class LossWeighting(Method):
    """``sum_k w_k L_k`` over all heads: each modality's own classifier, and the fused one.

    With fixed weights it is what the papers call uniform or multi-task training; a subclass
    measures the weights.

    Args:
        heads: names of the K >= 2 heads.
        weights: ``[K]``: finite, not negative, not all 0. Default uniform, ``1 / K``.
        label_smoothing: of `loss`, 0 to 1; default 0.
        ignore_index: label of samples that `loss` leaves out; default -100.
        process_group: whose ranks are measured together; default all of them.

    Raises:
        ValueError: fewer than two heads, a name given twice, weights of another length, negative,
            not finite or all 0, or ``label_smoothing`` out of range.
        TypeError: ``heads`` is text instead of names.
    """

    last: WeightingRecord | None
    label_smoothing = Setting(_label_smoothing)
    """0 to 1, as in ``torch.nn.functional.cross_entropy``."""
    ignore_index = Setting(_ignore_index)
    """Label of samples that do not count."""

    _what = "heads"

    def __init__(
        self,
        heads: Sequence[str],
        *,
        weights: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(heads, process_group=process_group)
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        count = len(self.names)
        self._weights = torch.full((count,), 1.0 / count, dtype=torch.float64, device="cpu")
        self._uniform = self._weights.clone()
        if weights is not None:
            self.weights = weights

    @property
    def weights(self) -> Tensor:
        """Weight of each head, float64 ``[K]``; assign to set them."""
        return self._weights.clone()

    @weights.setter
    def weights(self, weights: Tensor | Sequence[float]) -> None:
        self._weights.copy_(self._checked_weights(type(self).__name__, weights))

    def loss(self, logits: Mapping[str, Tensor], target: Tensor, *, class_dim: int = 1) -> Tensor:
        """The weighted loss ``sum_k w_k CE(logits_k, target)``, to be differentiated.

        Leaves each head's own loss in `last`. See `functional.blended_cross_entropy`; no host read.
        While `enabled` is False the weights are uniform.

        Args:
            logits: ``[B, C]`` or ``[B, C, ...]`` for each head.
            target: class indexes ``[B]`` or ``[B, ...]``, or soft labels shaped like the logits.
            class_dim: dimension of the classes in the logits; default 1, as in
                ``torch.nn.functional.cross_entropy``. ``-1`` for token logits ``[B, T, C]``.

        Returns:
            A scalar, float64 if any of the logits is, float32 otherwise.

        Raises:
            ValueError: a head is missing or unknown, and as ``blended_cross_entropy`` does.
            TypeError: as ``blended_cross_entropy`` does.
            IndexError: as ``blended_cross_entropy`` does.
        """
        op = f"{type(self).__name__}.loss"
        ordered = _checks.by_name(op, "logits", logits, self.names)
        _checks.batch_of_tensors(op, ordered, target)
        ordered, target = classes_second(op, ordered, target, class_dim)
        self._move(ordered[0].device)
        weights = self._weights if self.enabled else self._uniform
        loss, per_head, samples = blend(
            ordered,
            target,
            weights,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )
        self.last = WeightingRecord(per_head, weights, samples)
        return loss

    def _checked_weights(self, op: str, weights: Any) -> Tensor:
        values = tensor(op, "weights", weights, self._weights)
        if not (bool((values >= 0).all()) and bool(values.any())):
            raise ValueError(
                f"{op}: weights must be finite and not negative, one of them positive "
                f"(got {values.tolist()})"
            )
        return values

    def _state(self) -> dict[str, Any]:
        return {"weights": self._weights.tolist()}

    def _load(self, op: str, state: Mapping[str, Any]) -> None:
        self._weights.copy_(self._checked_weights(op, state["weights"]))

    def __repr__(self) -> str:
        weights = ", ".join(f"{each:.4g}" for each in self._weights.tolist())
        return super().__repr__().replace("; ", f"; weights=[{weights}], ", 1)

    def _move(self, device: torch.device) -> None:
        if self._weights.device != device:
            # A tensor made in inference mode could never be saved for a backward pass.
            with torch.inference_mode(False):
                self._weights = self._weights.to(device)
                self._uniform = self._uniform.to(device)


def as_losses(
    op: str,
    heads: Sequence[str],
    losses: Mapping[str, Tensor | float] | Tensor | Sequence[float],
) -> Tensor:
    """Losses of the heads, given by name or in order, as float64 ``[K]``, detached.

    Raises:
        ValueError: a head is missing or unknown, or another number of losses.
    """
    if isinstance(losses, Mapping):
        own = _checks.by_name(op, "losses", losses, heads)
        values = torch.stack([_float64(each) for each in own])
    else:
        values = _float64(losses)
    if values.shape != (len(heads),):
        raise ValueError(f"{op}: losses must be [{len(heads)}] (got {list(values.shape)})")
    return values.detach()


def _float64(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values.double()
    return torch.tensor(values, dtype=torch.float64, device="cpu")
