"""OPM in plain PyTorch: features of a modality that dominates, dropped for some samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmbal_fast.reference._noise import uniform_words


def drop_features(
    features: Sequence[Tensor],
    ratios: Tensor,
    *,
    base: float,
    strength: float,
    apply: float = 1.0,
    seed: int = 0,
    step: int | Tensor = 0,
    stream: int = 1,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Drops features of the modalities that dominate, for whole samples, and scales the rest.

    ``q_m = clamp(base (1 + strength tanh(rho_m - 1)), 0, 1)`` where ``rho_m > 1``, else 0;
    ``x_m <- x_m keep_m / (1 - theta)``, ``keep_m[i] ~ Bernoulli(1 - q_m)``,
    ``theta = sum_m d_m q_m / sum_m d_m`` with ``d_m`` features: on-the-fly prediction modulation
    of Wei, Hu, Du, Wen, "On-the-fly Modulation for Balanced Multimodal Learning" (TPAMI 2024).

    Args:
        features: M tensors ``[B, ...]``, floating point.
        ratios: float32 ``[M]``.
        base: 0 to 1.
        strength: from 0 on.
        apply: probability that anything is dropped, 0 to 1; one draw for the batch.
        seed: 64-bit seed of the draws.
        step: step number, an int or an integer tensor of one element; its low 32 bits count.
        stream: 32-bit id of the first modality's draws; 0 is the batch's.

    Returns:
        The features to fuse; the weight of each sample, ``[B]`` in the type of the first, 0 if it
        lost every modality, else 1; the probabilities ``q``, float32 ``[M]``; and what rows were
        multiplied by, float32 ``[M, B]``.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> ones = [torch.ones(1, 2), torch.ones(1, 2)]
        >>> ratios = torch.tensor([9.0, 0.1])
        >>> features, weight, q, _ = reference.drop_features(ones, ratios, base=1.0, strength=0.5)
        >>> features
        [tensor([[0., 0.]]), tensor([[2., 2.]])]
    """
    batch, device = features[0].shape[0], features[0].device
    with torch.no_grad():
        applied = _below(apply, 1, seed, step, 0, device)
        q = base * (1.0 + strength * torch.tanh(ratios.double() - 1.0))
        q = torch.where((ratios > 1.0) & applied, q.clamp(max=1.0), 0.0).float()
        kept = torch.stack(
            [~_below(q[m].double(), batch, seed, step, stream + m, device) for m in range(len(q))]
        )
        widths = torch.tensor(
            [each.shape[1:].numel() for each in features], dtype=torch.float64, device=device
        )
        theta = ((widths * q).sum() / widths.sum()).nan_to_num()
        factors = torch.where(kept, 1.0 / (1.0 - theta), 0.0).float()
    scaled = scaled_rows(features, factors)
    return scaled, kept.any(dim=0).to(features[0].dtype), q, factors


def scaled_rows(rows: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """Rows times a factor for each, rounded once; 0 where that is 0, whatever the row holds.

    Args:
        rows: M tensors ``[B, ...]``.
        factors: float32 ``[M, B]``.
    """
    results = []
    for each, factor in zip(rows, factors, strict=True):
        by_row = factor.reshape(-1, *(1,) * (each.ndim - 1))
        wide = each if each.dtype == torch.float64 else each.float()
        results.append((wide * by_row).masked_fill(by_row == 0, 0.0).to(each.dtype))
    return results


def _below(
    probability: float | Tensor,
    count: int,
    seed: int,
    step: int | Tensor,
    stream: int,
    device: torch.device,
) -> Tensor:
    words = uniform_words(0, count, seed=seed, step=step, tensor_id=stream, device=device)
    return (words.double() + 0.5) * 2.0**-32 < probability
