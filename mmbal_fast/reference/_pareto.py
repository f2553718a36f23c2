"""MMPareto's combination of two gradients in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmbal_fast.reference._gradient_dots import gradient_dots
from mmbal_fast.reference._ogm import compute_dtype, saturated


@torch.no_grad()
def pareto_(
    grads: Sequence[Tensor | None],
    own: Sequence[Tensor | None],
    modality: Sequence[int],
    modalities: int,
    *,
    gamma: float = 1.5,
    dots: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Combines the gradients of two losses so that neither is worked against, in place.

    See `mmbal_fast.functional`.

    Args:
        grads: T floating point tensors ``G = g1 + g2`` of any shape, or None; written in place.
        own: T tensors ``g2`` of the same shapes, or None.
        modality: T positions from 0 to ``modalities`` - 1.
        modalities: M.
        gamma: factor of the result.
        dots: float64 ``[T, 3]`` as `gradient_dots` gives them; by default those of ``grads`` and
            ``own``.
        scale: float32 ``[]``, which ``own`` and its dots are still to be divided by.

    Returns:
        float64 ``[2, M]``: cosines, and the weights of ``g1``.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> total, own = torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 1.0])  # g1 = (1, 0)
        >>> reference.pareto_([total], [own], [0], 1)
        tensor([[-0.7071],
                [ 0.6000]], dtype=torch.float64)
        >>> total
        tensor([0.6708, 1.3416])
    """
    if dots is None:
        dots = gradient_dots(grads, own)
    device = dots.device
    inverse = 1.0 if scale is None else 1.0 / scale.to(device, torch.float64)
    used = [
        index
        for index, (total, second) in enumerate(zip(grads, own, strict=True))
        if total is not None and second is not None and total.numel() > 0 and second.numel() > 0
    ]
    rows = torch.tensor(used, dtype=torch.int64, device=device)
    owner = torch.tensor([modality[i] for i in used], dtype=torch.int64, device=device)
    whole, mixed, c_ = dots[rows].unbind(1)
    mixed, c_ = mixed * inverse, c_ * inverse * inverse
    b_ = mixed - c_  # g1.g2, as g1 = G - g2
    a_ = (whole - mixed - b_).clamp(min=0.0)
    a, b, c = (
        torch.zeros(modalities, dtype=torch.float64, device=device).index_add(0, owner, each)
        for each in (a_, b_, c_)
    )
    lengths = a.sqrt() * c.sqrt()
    cosines = torch.where(lengths != 0, b / lengths, 0.0)
    weight = (c - b) / (a - 2 * b + c)
    weight = torch.where(b >= c, 0.001, weight)  # in this order, as the released solver has it
    weight = torch.where(b >= a, 0.999, weight)
    weight = torch.where(cosines > 0, 0.5, weight)
    weight = torch.where((a + b + c).isfinite(), weight, torch.nan)
    k1, k2 = 2 * weight[owner], 2 * (1 - weight[owner])
    length = k1 * k1 * a_ + 2 * k1 * k2 * b_ + k2 * k2 * c_
    ratio = torch.where(length > 0, (whole / length).sqrt(), 1.0)
    factor = gamma * ratio.clamp(min=1.0)
    # h = k1 g1 + k2 g2 = k1 G + (k2 - k1) g2
    for position, index in enumerate(used):
        total, second = grads[index], own[index]
        assert total is not None
        assert second is not None
        dtype = compute_dtype(total)
        by, share = (
            each[position].to(total.device, dtype)
            for each in (factor * k1, factor * (k2 - k1) * inverse)
        )
        new = total.to(dtype) * by
        new = torch.where(share == 0, new, new + second.to(dtype) * share)
        total.copy_(torch.where(by.isnan(), total, saturated(total, new)))
    return torch.stack([cosines, weight])
