"""OGM-GE in plain PyTorch: scores, ratios, coefficients, moments and the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mmbal_fast.reference._noise import chunks, flat, is_dense, normals

Rule: TypeAlias = Literal["cvpr2022", "cvpr2022_excess", "tpami2024"] | Callable[..., Tensor]
"""How a discrepancy ratio becomes a coefficient: a published rule, or a callable."""

RULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "cvpr2022": lambda ratios, alpha: 1.0 - torch.tanh(alpha * ratios),
    "cvpr2022_excess": lambda ratios, alpha: 1.0 - torch.tanh(alpha * (ratios - 1.0)),
    "tpami2024": lambda ratios, alpha: (1.0 - alpha * torch.tanh(ratios - 1.0)).clamp(min=0.0),
}
"""The published rules, for ratios above 1."""


Statistic: TypeAlias = Literal["probability", "log_probability", "accuracy"]
"""What a sample adds to a score."""

LOG_FLOOR = math.log(1e-8)
"""Least log-probability, as in the released code of AGM."""


@torch.no_grad()
def contribution_scores(
    logits: Sequence[Tensor],
    target: Tensor,
    *,
    ignore_index: int = -100,
    multi_label: bool = False,
    statistic: Statistic = "probability",
) -> Tensor:
    """Contribution of each modality: the summed softmax probability of the true class.

    ``S_m = sum_i softmax(logits_m[i])[y_i]``; for soft labels ``q``,
    ``S_m = sum_i sum_c q[i, c] softmax(logits_m[i])[c]``. Peng et al., "Balanced Multimodal
    Learning via On-the-fly Gradient Modulation" (CVPR 2022), section 3.2, the sums in the
    definition of the discrepancy ratio. With ``multi_label``
    ``S_m = sum_i mean_c (t[i, c] sigmoid(x[i, c]) + (1 - t[i, c]) sigmoid(-x[i, c]))``.

    Args:
        logits: M tensors ``[B, C]`` or ``[B, C, ...]``, floating point; one per modality.
        target: class indexes, integer, ``[B]`` or ``[B, ...]``; or soft labels, floating point, of
            the shape of the logits, or whether each class is true.
        ignore_index: samples with this label add nothing; default -100, as in
            ``torch.nn.functional.cross_entropy``. Not used for soft labels.
        multi_label: whether ``target`` says of each class by itself if it is true.
        statistic: what a sample adds: the probability of what is true, its logarithm from log 1e-8
            on, or whether it is the likeliest, of equal ones the first.

    Returns:
        float32 ``[M]`` without autograd graph, 0 for an empty batch. Computed in float32, for
        float64 logits in float64.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> confident, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> reference.contribution_scores([confident, unsure], torch.tensor([0]))
        tensor([0.9999, 0.5000])
    """
    each_of = _multi_label_score if multi_label else _score
    return torch.stack(
        [each_of(each.to(compute_dtype(each)), target, ignore_index, statistic) for each in logits]
    )


def _score(x: Tensor, target: Tensor, ignore_index: int, statistic: Statistic) -> Tensor:
    if statistic == "accuracy":
        return _hits(x, target, ignore_index)
    values = x.softmax(1)
    if statistic == "log_probability":
        values = x.log_softmax(1).clamp(min=LOG_FLOOR)
    if target.is_floating_point():
        return (values * target).sum().float()
    ignored = target == ignore_index
    label = target.long().masked_fill(ignored, 0).unsqueeze(1)
    return values.gather(1, label).squeeze(1).masked_fill(ignored, 0.0).sum().float()


def _hits(x: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    label = target.argmax(1) if target.is_floating_point() else target
    hit = (x.argmax(1) == label) & ~x.isnan().any(1)
    if not target.is_floating_point():
        hit &= target != ignore_index
    return hit.sum(dtype=torch.float32)


def _multi_label_score(
    x: Tensor, target: Tensor, ignore_index: int, statistic: Statistic
) -> Tensor:
    if statistic == "accuracy":
        right = ((x > 0) == (target > 0.5)) & ~x.isnan()
        return right.to(x.dtype).mean(1).sum().float()
    values, others = x.sigmoid(), (-x).sigmoid()
    if statistic == "log_probability":
        values, others = values.log().clamp(min=LOG_FLOOR), others.log().clamp(min=LOG_FLOOR)
    truth = target.to(x.dtype)
    return (truth * values + (1.0 - truth) * others).mean(1).sum().float()


@torch.no_grad()
def discrepancy_ratios(scores: Tensor) -> Tensor:
    """How much more each modality contributes than the others.

    ``rho_m = mean over j != m of S_m / S_j``; for two modalities ``S_0 / S_1`` and ``S_1 / S_0``,
    the discrepancy ratio of OGM-GE (CVPR 2022, section 3.2). The mean is its extension to M
    modalities in Wei et al., "On-the-fly Modulation for Balanced Multimodal Learning" (TPAMI 2024).

    Args:
        scores: ``[M]``, M >= 2, as `contribution_scores` gives them.

    Returns:
        float32 ``[M]``; inf where another modality's score is 0, NaN where both are.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> reference.discrepancy_ratios(torch.tensor([6.0, 3.0, 2.0]))
        tensor([2.5000, 1.0000, 0.5000])
    """
    scores = scores.float()
    pairwise = scores.unsqueeze(1) / scores.unsqueeze(0)
    return pairwise.fill_diagonal_(0.0).sum(dim=1) / (len(scores) - 1)


@torch.no_grad()
def modulation_coefficients(ratios: Tensor, alpha: float, *, rule: Rule = "cvpr2022") -> Tensor:
    """Factor for the gradients of each modality: 1, or less where the modality dominates.

    Where ``rho_m > 1``, and 1 elsewhere:

    - ``"cvpr2022"``: ``1 - tanh(alpha * rho_m)``, OGM-GE (CVPR 2022), section 3.2;
    - ``"cvpr2022_excess"``: ``1 - tanh(alpha * (rho_m - 1))``, the first release of its code;
    - ``"tpami2024"``: ``max(0, 1 - alpha * tanh(rho_m - 1))``, the journal version (TPAMI 2024).

    Args:
        ratios: ``[M]``, as `discrepancy_ratios` gives them.
        alpha: strength of the modulation, >= 0. The OGM-GE paper's code has 0.8 for CREMA-D and
            0.1 for VGGSound. Not used by a callable rule.
        rule: one of the names above, default the published one, or a callable that gets the ratios
            (float32 ``[M]``) and returns the coefficients.

    Returns:
        float32 ``[M]`` without autograd graph; 1 instead of NaN, so that undefined ratios
        throttle nothing.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> reference.modulation_coefficients(torch.tensor([2.0, 0.5, float("nan")]), alpha=0.1)
        tensor([0.8026, 1.0000, 1.0000])
    """
    ratios = ratios.float()
    if callable(rule):
        return _nan_to_one(rule(ratios).float())
    return _nan_to_one(torch.where(ratios > 1.0, RULES[rule](ratios, alpha), 1.0))


@torch.no_grad()
def gradient_moments(grads: Sequence[Tensor | None]) -> Tensor:
    """Count, mean and sum of squared deviations of each gradient.

    Chan's formula merges such rows from shards; ``sqrt(M2 / (count - 1))`` is the unbiased
    standard deviation that scales the noise of OGM-GE (CVPR 2022, section 3.3).

    Args:
        grads: T floating point tensors of any shape, or None.

    Returns:
        float64 ``[T, 3]``, rows ``(count, mean, M2)``, computed in float64, on the device of the
        first gradient; a row of zeros for None and for an empty tensor.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> reference.gradient_moments([torch.tensor([1.0, 2.0, 6.0]), None])
        tensor([[ 3.,  3., 14.],
                [ 0.,  0.,  0.]], dtype=torch.float64)
    """
    device = next((grad.device for grad in grads if grad is not None), torch.device("cpu"))
    moments = torch.zeros(len(grads), 3, dtype=torch.float64, device=device)
    for row, grad in zip(moments, grads, strict=True):
        if grad is not None and grad.numel() > 0:
            values = grad.double()
            row[0] = grad.numel()
            row[1] = mean = (values / grad.numel()).sum()  # no sum that overflows
            row[2] = (values - mean).square().sum()
    return moments


@torch.no_grad()
def modulate_(
    grads: Sequence[Tensor | None],
    coefficients: Tensor,
    modality: Sequence[int],
    *,
    noise: float = 1.0,
    seed: int = 0,
    step: int | Tensor = 0,
    tensor_ids: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    moments: Tensor | None = None,
    eps: float = 1e-8,
) -> None:
    """Scale gradients in place and add noise of their own standard deviation.

    ``g <- k_m g + noise * (std(g) + eps) * z`` with standard normal ``z`` (see `noise_like`) and
    the unbiased ``std`` of all elements of the gradient before scaling: OGM-GE (CVPR 2022), section
    3.3; without noise OGM, section 3.2. Float64 gradients are computed in float64, others in
    float32, with one rounding to their dtype. None and empty tensors are skipped.

    A gradient with NaN or inf is only scaled, and so is one so large that noise could overflow its
    type. A float16 result saturates at +-65504 where the gradient was finite.

    Args:
        grads: T floating point tensors of any shape and layout, or None; written in place.
        coefficients: float32 ``[M]``; NaN counts as 1.
        modality: T indexes into ``coefficients``.
        noise: factor of the noise, default 1 as in OGM-GE; 0 gives exactly ``k_m g``.
        seed: 64-bit seed of the noise.
        step: step number, an int or an integer tensor of one element; its low 32 bits count.
        tensor_ids: T 32-bit ids, by default the positions 0 to T - 1.
        offsets: T global indexes of the tensors' first elements, by default 0; for shards.
        moments: float64 ``[T, 3]``, rows ``(count, mean, M2)``; by default those of ``grads``. For
            shards give those of the whole tensors.
        eps: added to the standard deviation, default 1e-8 as in the released code.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> audio, image = torch.ones(2), torch.ones(2)
        >>> reference.modulate_([audio, image], torch.tensor([0.25, 1.0]), [0, 1], noise=0.0)
        >>> audio, image
        (tensor([0.2500, 0.2500]), tensor([1., 1.]))
    """
    if noise != 0 and moments is None:
        moments = gradient_moments(grads)
    for index, grad in enumerate(grads):
        if grad is None:
            continue
        dtype = compute_dtype(grad)
        values = flat(grad)
        coefficient = _nan_to_one(coefficients[modality[index]])
        scale = coefficient.to(grad.device, dtype)
        if moments is not None and noise != 0:
            amplitude = _noise_amplitude(moments[index], coefficient, noise, eps, grad.dtype)
        for piece in chunks(grad.numel()):
            old = values[piece]
            new = old.to(dtype) * scale
            if noise != 0:
                drawn = normals(
                    piece.start + (0 if offsets is None else offsets[index]),
                    piece.stop - piece.start,
                    seed=seed,
                    step=step,
                    tensor_id=index if tensor_ids is None else tensor_ids[index],
                    device=grad.device,
                )
                # A tensor of no dimension does not widen the type of a product.
                new = new + amplitude.to(grad.device, dtype) * drawn.to(dtype)
            values[piece] = saturated(old, new)
        if not is_dense(grad):
            grad.copy_(values.view(grad.shape))


def _noise_amplitude(
    moments: Tensor, coefficient: Tensor, noise: float, eps: float, dtype: torch.dtype
) -> Tensor:
    count, mean, m2 = moments.unbind()
    std = (m2 / (count - 1.0)).sqrt().masked_fill(count <= 1.0, 0.0)
    amplitude = noise * (std + eps)
    # No element is farther from the mean than sqrt(M2), no normal beyond 6.8. Without noise where
    # that is more than the type holds: finite elements stay finite. Float16 saturates instead.
    element = mean.abs() + m2.sqrt()
    largest = torch.finfo(torch.float64 if dtype == torch.float16 else dtype).max
    reach = coefficient.to(element).abs() * element + 6.8 * amplitude
    return torch.where(reach <= largest, amplitude, 0.0)


def _nan_to_one(values: Tensor) -> Tensor:
    return values.masked_fill(values.isnan(), 1.0)


def saturated(old: Tensor, new: Tensor) -> Tensor:
    """What is written for ``new`` over ``old``: float16 stays finite where it was."""
    if old.dtype == torch.float16:
        new = torch.where(old.isfinite(), new.clamp(-65504.0, 65504.0), new)
    return new.to(old.dtype)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Computed in float64 for float64, else in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
