"""What people run today, written out: the baselines of the benchmarks and of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def published_coefficients(
    logits: Sequence[Tensor], target: Tensor, alpha: float
) -> tuple[list[float], list[float]]:
    """Scores and coefficients of two modalities as the released OGM-GE code computes them.

    One sample at a time, in Python, read by the host.

    Args:
        logits: two tensors ``[B, C]``.
        target: ``[B]``, integer.
        alpha: strength of the modulation.

    Returns:
        The two scores and the two coefficients.
    """
    first, second = logits
    # Softmax anew for every sample, as released.
    scores: list[Any] = [
        sum(torch.softmax(each, dim=1)[i][target[i]] for i in range(len(target)))
        for each in (first, second)
    ]
    ratio = scores[0] / scores[1]
    coefficients = [1.0, 1.0]
    if ratio > 1:
        coefficients[0] = 1 - float(torch.tanh(alpha * torch.relu(ratio)))
    else:
        coefficients[1] = 1 - float(torch.tanh(alpha * torch.relu(1 / ratio)))
    return [float(score) for score in scores], coefficients


def published_update_(
    grads: Sequence[Tensor], coefficients: Sequence[float], modality: Sequence[int], noise: bool
) -> None:
    """Scales gradients and adds noise as the released OGM-GE code does, tensor by tensor.

    Args:
        grads: gradients, rewritten in place.
        coefficients: one per modality.
        modality: one per gradient.
        noise: whether to add noise (OGM-GE) or only scale (OGM).
    """
    for grad, owner in zip(grads, modality, strict=True):
        scaled = grad * coefficients[owner]
        if noise:
            scaled = scaled + torch.zeros_like(grad).normal_(0, grad.std().item() + 1e-8)
        grad.copy_(scaled)


def plain_coefficients(logits: Sequence[Tensor], target: Tensor, alpha: float) -> Tensor:
    """Coefficients of two modalities as a careful user would compute them: no host read.

    Args:
        logits: two tensors ``[B, C]``.
        target: ``[B]``, integer.
        alpha: strength of the modulation.

    Returns:
        float32 ``[2]``.
    """
    label = target.unsqueeze(1)
    scores = torch.stack([each.softmax(dim=1).gather(1, label).sum() for each in logits])
    ratios = scores / scores.flip(0)
    return torch.where(ratios > 1, 1 - torch.tanh(alpha * ratios), 1.0)


def plain_update_(
    grads: Sequence[Tensor], coefficients: Tensor, modality: Sequence[int], noise: bool
) -> None:
    """Scales gradients and adds noise with the best that plain PyTorch has.

    In place, no host read, ``_foreach`` where there is one; the noise of each tensor by its own
    ``normal_``, for which there is none.

    Args:
        grads: gradients, rewritten in place.
        coefficients: float32 ``[M]``.
        modality: one per gradient.
        noise: whether to add noise (OGM-GE) or only scale (OGM).
    """
    drawn: list[Tensor] = []
    if noise:
        for grad in grads:
            drawn.append(torch.empty_like(grad).normal_().mul_(grad.std() + 1e-8))
    for index, coefficient in enumerate(coefficients.unbind()):
        torch._foreach_mul_(
            [g for g, m in zip(grads, modality, strict=True) if m == index], coefficient
        )
    if noise:
        torch._foreach_add_(list(grads), drawn)
