"""Dot products over pairs of gradients in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def gradient_dots(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Tensor:
    """``(g1 . g1, g1 . g2, g2 . g2)`` of each pair of gradients; see `mmbal_fast.functional`.

    Args:
        first: T floating point tensors of any shape, or None.
        second: T tensors of the same shapes, or None.

    Returns:
        float64 ``[T, 3]``, computed in float64, on the device of the first tensor; a row of zeros
        where one of a pair is None or empty.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> reference.gradient_dots([torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 0.0])])
        tensor([[25.,  3.,  1.]], dtype=torch.float64)
    """
    device = next((each.device for each in first if each is not None), torch.device("cpu"))
    dots = torch.zeros(len(first), 3, dtype=torch.float64, device=device)
    for row, one, other in zip(dots, first, second, strict=True):
        if one is not None and other is not None and one.numel() > 0 and other.numel() > 0:
            x, y = one.double(), other.double()
            row.copy_(torch.stack([(x * x).sum(), (x * y).sum(), (y * y).sum()]))
    return dots
