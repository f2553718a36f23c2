"""Gradient-Blending in plain PyTorch: OGR, weights and the blended loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

FLOOR = 0.1
"""Default of ``floor``: what is below a tenth of the largest gain cannot be told from noise."""


def increments(
    train_before: Tensor, val_before: Tensor, train_after: Tensor, val_after: Tensor
) -> tuple[Tensor, Tensor]:
    """Generalization ``dG`` and overfitting ``dO`` between two checkpoints, each float64 ``[K]``.

    Wang et al., "What Makes Training Multi-Modal Classification Networks Hard?" (CVPR 2020),
    section 3.1: ``O_N = L^V_N - L^T_N``, ``dO = O_{N+n} - O_N``, ``dG = L^V_N - L^V_{N+n}``.
    """
    val_before, val_after = val_before.double(), val_after.double()
    overfitting = (val_after - train_after.double()) - (val_before - train_before.double())
    return val_before - val_after, overfitting


def overfitting_to_generalization_ratio(
    train_before: Tensor, val_before: Tensor, train_after: Tensor, val_after: Tensor
) -> Tensor:
    """``|dO / dG|``, float64 ``[K]``; see `mmbal_fast.functional`.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> before, train, val = torch.ones(1), torch.tensor([0.4]), torch.tensor([0.5])
        >>> ratio = reference.overfitting_to_generalization_ratio(before, before, train, val)
        >>> round(ratio.item(), 6)  # the gap grew by 0.1, the validation loss fell by 0.5
        0.2
    """
    gain, overfitting = increments(train_before, val_before, train_after, val_after)
    return (overfitting / gain).abs()


def shares(
    train_before: Tensor,
    val_before: Tensor,
    train_after: Tensor,
    val_after: Tensor,
    *,
    floor: float,
) -> Tensor:
    """``dG_k / dO_k^2`` in units of the largest gain, float64 ``[K]``; 0 for an unusable head."""
    gain, overfitting = increments(train_before, val_before, train_after, val_after)
    usable = gain.isfinite() & overfitting.isfinite() & (gain > 0)
    # Relative to the largest gain: then scaling the losses changes nothing, floor included.
    largest = torch.where(usable, gain, 0.0).max()
    each = gain / largest / (overfitting / largest).square().clamp(min=floor**2)
    return torch.where(usable, each, 0.0)


def normalized(shares: Tensor) -> Tensor:
    """Shares that add up to 1; uniform where there are none."""
    total = shares.sum()
    return torch.where(total > 0, shares / total, 1.0 / shares.numel())


def blending_weights(
    train_before: Tensor,
    val_before: Tensor,
    train_after: Tensor,
    val_after: Tensor,
    *,
    floor: float = FLOOR,
) -> Tensor:
    """``w_k ~ dG_k / dO_k^2``, float64 ``[K]``, sum 1; see `mmbal_fast.functional`.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> before = torch.ones(2)
        >>> train, val = torch.tensor([0.4, 0.3]), torch.tensor([0.5, 0.5])
        >>> reference.blending_weights(before, before, train, val)  # dG / dO^2 = 50 and 12.5
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """
    return normalized(shares(train_before, val_before, train_after, val_after, floor=floor))


def compute_dtype(logits: Sequence[Tensor]) -> torch.dtype:
    """What losses are computed in: float64 if any of the logits is, float32 otherwise."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def blended_cross_entropy(
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Tensor | Sequence[float],
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """``sum_k w_k CE(logits_k, target)`` and the K cross-entropies; see `mmbal_fast.functional`.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> logits = [torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])]
        >>> loss, per_head = reference.blended_cross_entropy(logits, torch.tensor([0]), [0.5, 0.5])
        >>> loss, per_head
        (tensor(0.4100), tensor([0.6931, 0.1269]))
    """
    dtype = compute_dtype(logits)
    weights = torch.as_tensor(weights, dtype=torch.float64, device=logits[0].device).to(dtype)
    soft = target.is_floating_point()
    target = target.to(dtype) if soft else target.long()
    losses = []
    for x, weight in zip(logits, weights.unbind(), strict=True):
        # Detached where the weight is 0, not multiplied: 0 * NaN would be NaN.
        x = torch.where(weight == 0, x.detach(), x).to(dtype)
        ignored = -100 if soft else ignore_index  # soft labels have none
        losses.append(
            F.cross_entropy(x, target, label_smoothing=label_smoothing, ignore_index=ignored)
        )
    per_head = torch.stack(losses)
    loss = torch.where(weights == 0, 0.0, weights * per_head).sum()
    return loss, per_head.detach()
