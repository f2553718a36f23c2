"""What people run today, written out: the baselines of the benchmarks and of the tests."""

from __future__ import annotations

import math
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


def published_agm_coefficients(
    logits: Sequence[Tensor], target: Tensor, memory: dict[str, Any]
) -> list[float]:
    """Coefficients of two modalities as the released AGM code computes them: a Python loop.

    The released code scales by a hook on what enters the Shapley logits; what that does to the
    gradients of encoders under a linear head is scaling them.

    Args:
        logits: two tensors ``[B, C]``.
        target: ``[B]``, integer.
        memory: running means, written.

    Returns:
        The two coefficients, for ``alpha = 0.8``.
    """
    scores = [0.0, 0.0]
    probabilities = [each.softmax(dim=1) for each in logits]
    for i, label in enumerate(target):
        for m in range(2):
            scores[m] += -math.log(max(probabilities[m][i][label].item(), 1e-8)) / len(target)
    means, step = memory.get("means", [0.0, 0.0]), memory.get("step", 0) + 1
    coefficients = [
        math.exp(
            0.8 * min(math.exp(means[1 - m] - means[m]) - math.exp(scores[1 - m] - scores[m]), 10.0)
        )
        for m in range(2)
    ]
    memory["means"] = [
        mean * (step - 1) / step + score / step for mean, score in zip(means, scores, strict=True)
    ]
    memory["step"] = step
    return coefficients


def published_mlb_coefficients(
    logits: Sequence[Tensor], target: Tensor, memory: dict[str, Any]
) -> list[float]:
    """Coefficients of two modalities as the released MLB code computes them.

    Args:
        logits: two tensors ``[B, C]``.
        target: ``[B]``, integer.
        memory: not used.

    Returns:
        The two coefficients, for ``alpha = 0.8``.
    """
    del memory
    scores = [
        torch.stack([each.softmax(dim=1)[i][target[i]] for i in range(len(target))]).mean().item()
        for each in logits
    ]
    return [1 + math.tanh(0.8 * (scores[1 - m] / scores[m] - 1)) for m in range(2)]


def published_metric_coefficients(
    logits: Sequence[Tensor], target: Tensor, memory: dict[str, Any]
) -> list[float]:
    """Coefficients of the accuracy of each modality as the released CGGM code computes them.

    Args:
        logits: M tensors ``[B, C]``.
        target: ``[B]``, integer.
        memory: accuracies of the step before, written.

    Returns:
        M coefficients, for ``rho = 1.3``; where no metric falls those of ours.
    """
    now = [(each.argmax(dim=1) == target).float().mean().item() for each in logits]
    gains = [e - before for e, before in zip(now, memory.get("now", [0.0] * len(now)), strict=True)]
    memory["now"] = now
    total = sum(gains) + 1e-8
    return [1.3 * (total - gain) / total for gain in gains]


def published_dropping(
    features: Sequence[Tensor], probabilities: Sequence[float]
) -> tuple[list[Tensor], Tensor]:
    """Features as the released OPM code drops them: masks of the host, rows taken out.

    Args:
        features: M tensors ``[B, D]``.
        probabilities: of being dropped.

    Returns:
        The scaled features, and which samples lost every modality.
    """
    widths = [each.shape[1] for each in features]
    theta = sum(d * q for d, q in zip(widths, probabilities, strict=True)) / sum(widths)
    masks = [
        torch.full((len(each), 1), 1 - q).bernoulli().to(each.device)
        for each, q in zip(features, probabilities, strict=True)
    ]
    gone = torch.stack(masks).sum(0).flatten() == 0
    return [
        each * mask * (1 / (1 - theta)) for each, mask in zip(features, masks, strict=True)
    ], gone


def published_pareto_(
    total: Sequence[Tensor], fused: Sequence[Tensor], own: Sequence[Tensor], gamma: float = 1.5
) -> None:
    """Combines two gradients of an encoder as the released MMPareto code does.

    Clones of every gradient, their concatenations, dot products that the host reads, norms of each
    tensor; without its backward passes.

    Args:
        total: gradients of the sum of all losses, rewritten in place.
        fused: those of the fused loss.
        own: those of the modality's own loss.
        gamma: factor of the result.
    """
    first, second = [each.clone() for each in fused], [each.clone() for each in own]
    one = torch.cat([each.flatten() for each in first])
    other = torch.cat([each.flatten() for each in second])
    if torch.nn.functional.cosine_similarity(one, other, dim=0) > 0:
        weights = [0.5, 0.5]
    else:
        v1v1, v1v2, v2v2 = (
            torch.dot(x, y).cpu().item() for x, y in ((one, one), (one, other), (other, other))
        )
        if v1v2 >= v1v1:
            c = 0.999
        elif v1v2 >= v2v2:
            c = 0.001
        else:
            c = -((v1v2 - v2v2) / (v1v1 + v2v2 - 2 * v1v2))
        weights = [c, 1 - c]
    for grad, x, y in zip(total, first, second, strict=True):
        norm = torch.norm(grad.clone())
        new = 2 * weights[0] * x + 2 * weights[1] * y
        ratio = norm / torch.norm(new.clone())
        grad.copy_(new * ratio * gamma if ratio > 1 else new * gamma)


def published_pull_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    factors: Sequence[float],
) -> list[Tensor]:
    """Pulls weights towards earlier ones as the released InfoReg code does, tensor by tensor.

    Args:
        grads: gradients, rewritten in place.
        weights: parameters.
        anchors: what they are pulled to.
        factors: one for each.

    Returns:
        The squares of each gradient, as its Fisher matrix adds them up.
    """
    squares = []
    for grad, weight, anchor, factor in zip(grads, weights, anchors, factors, strict=True):
        grad += (factor * (weight - anchor)).detach()
        squares.append(grad**2)
    return squares
