"""Pools of the predictions of several heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmbal_fast.functional import _checks


def log_probabilities(
    op: str, names: Sequence[str], logits: Mapping[str, Tensor | None]
) -> list[Tensor | None]:
    """``log softmax`` over dimension 1 of each head's logits, in the order of the names.

    In float32, or in float64 if the logits are; None for a head that is missing.

    Raises:
        TypeError: logits that are neither a floating point tensor nor None.
        ValueError: other names, no logits at all, or logits of different shapes.
    """
    ordered = _checks.by_name(op, "logits", logits, names)
    present = [each for each in ordered if each is not None]
    if not present:
        raise ValueError(f"{op}: logits must hold at least one tensor (got None for {list(names)})")
    for each in present:
        if not isinstance(each, Tensor) or not each.is_floating_point():
            kind = each.dtype if isinstance(each, Tensor) else type(each).__name__
            raise TypeError(f"{op}: logits must be floating point tensors or None (got {kind})")
    if present[0].ndim < 2 or any(each.shape != present[0].shape for each in present):
        raise ValueError(
            f"{op}: logits must have one shape [B, C] or [B, C, ...] "
            f"(got {[list(each.shape) for each in present]})"
        )
    return [
        None if each is None else each.to(at_least_float32(each)).log_softmax(dim=1)
        for each in ordered
    ]


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """What is computed in: half precision widens to float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def log_linear_pool(log_probs: Sequence[Tensor | None], weights: Tensor) -> Tensor:
    """``log softmax sum_m w_m log p_m``: a weighted product of experts.

    Genest, Zidek, "Combining Probability Distributions: A Critique and an Annotated Bibliography"
    (Statistical Science 1986), section 3. A head of weight 0 has no say, whatever it predicts.

    Args:
        log_probs: ``[B, C]`` or ``[B, C, ...]`` of each of M heads, or None for a missing one.
        weights: ``[M]``, or ``[B, M]`` for each sample.

    Returns:
        Log-probabilities shaped like one of ``log_probs``.
    """
    terms = []
    for m, each in enumerate(log_probs):
        if each is not None:
            weight = weights[..., m].to(each.dtype)
            weight = weight.reshape(-1, *(1,) * (each.ndim - 1))
            terms.append(torch.where(weight > 0, weight * each, 0.0))
    return torch.stack(terms).sum(dim=0).log_softmax(dim=1)
