"""The OGR of Gradient-Blending."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmbal_fast import reference
from mmbal_fast.functional import _checks


def overfitting_to_generalization_ratio(
    train_before: Tensor | Sequence[float],
    val_before: Tensor | Sequence[float],
    train_after: Tensor | Sequence[float],
    val_after: Tensor | Sequence[float],
) -> Tensor:
    """How much each head overfitted for what it gained between two checkpoints (OGR).

    With the gap ``O = L^V - L^T``: ``OGR = |dO / dG|``, ``dO = O_after - O_before`` and
    ``dG = L^V_before - L^V_after``. Wang, Tran, Feiszli, "What Makes Training Multi-Modal
    Classification Networks Hard?" (CVPR 2020), section 3.1, equation 2. Lower is better, as long
    as the head gained: the ratio does not show the sign of ``dG``. `blending_weights` does.

    Args:
        train_before: ``[K]``, loss of each head on the training set at the first checkpoint; a mean
            over samples, so that splits of different size compare.
        val_before: the same on samples held out from the training set (never the test set).
        train_after: ``[K]`` on the training set at the second checkpoint.
        val_after: ``[K]`` on the held-out samples at the second checkpoint.

    Returns:
        float64 ``[K]`` on the device of the losses; ``inf`` where ``dG`` is 0, NaN where ``dO`` is
        0 too or a loss is NaN. No host read.

    Raises:
        ValueError: the four differ in shape or device, are not one-dimensional, or K < 2.

    Example:
        >>> from mmbal_fast.functional import overfitting_to_generalization_ratio
        >>> # Two heads: dG = 0.5 for both, the gap grew by 0.1 and by 0.5.
        >>> overfitting_to_generalization_ratio([1.0, 1.0], [1.0, 1.0], [0.4, 0.0], [0.5, 0.5])
        tensor([0.2000, 1.0000], dtype=torch.float64)
    """
    return reference.overfitting_to_generalization_ratio(
        *checked_losses(
            "overfitting_to_generalization_ratio", train_before, val_before, train_after, val_after
        )
    )


def checked_losses(
    op: str, *losses: Tensor | Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four as float64 ``[K]``, or ValueError."""
    first, second, third, fourth = (
        _checks.numbers(op, name, each, None)
        for name, each in zip(
            ("train_before", "val_before", "train_after", "val_after"), losses, strict=True
        )
    )
    tensors = first, second, third, fourth
    if first.ndim != 1 or any(each.shape != first.shape for each in tensors):
        raise ValueError(
            f"{op}: the losses must have one shape [K] (got {[tuple(x.shape) for x in tensors]})"
        )
    if len(first) < 2:
        raise ValueError(f"{op}: there must be at least 2 heads (got {len(first)})")
    if any(each.device != first.device for each in tensors):
        raise ValueError(
            f"{op}: the losses must be on one device (got {[str(x.device) for x in tensors]})"
        )
    return tensors
