"""A pull towards earlier weights in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmbal_fast.reference._ogm import compute_dtype, saturated


@torch.no_grad()
def pull_(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    anchors: Sequence[Tensor | None],
    coefficients: Tensor,
    modality: Sequence[int],
) -> Tensor:
    """``g <- g + beta_m (theta - anchor)`` in place, and the squares of the result.

    See `mmbal_fast.functional`.

    Args:
        grads: T floating point tensors of any shape, or None; written in place.
        weights: T tensors of the same shapes, or None.
        anchors: T tensors of the same shapes, or None.
        coefficients: float32 ``[M]``, ``beta``; where it is 0 or NaN nothing is written.
        modality: T indexes into ``coefficients``.

    Returns:
        float64 ``[T]``: the sum of the squares of each gradient then; 0 where one of the three is
        None or empty.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> g, theta, anchor = torch.tensor([[1.0, 2.0], [3.0, 0.0], [1.0, 1.0]])
        >>> reference.pull_([g], [theta], [anchor], torch.tensor([0.5]), [0])
        tensor([6.2500], dtype=torch.float64)
        >>> g
        tensor([2.0000, 1.5000])
    """
    device = next((each.device for each in grads if each is not None), torch.device("cpu"))
    squares = torch.zeros(len(grads), dtype=torch.float64, device=device)
    for index, (g, theta, anchor) in enumerate(zip(grads, weights, anchors, strict=True)):
        if g is None or theta is None or anchor is None or 0 in (g.numel(), theta.numel()):
            continue
        dtype = compute_dtype(g)
        beta = coefficients[modality[index]].to(g.device, dtype)
        pulled = saturated(g, g.to(dtype) + beta * (theta.to(dtype) - anchor.to(dtype)))
        g.copy_(torch.where((beta == 0) | beta.isnan(), g, pulled))
        squares[index] = g.double().square().sum()
    return squares
