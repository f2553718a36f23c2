"""Sums of squares of many tensors in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def squared_norms(
    tensors: Sequence[Tensor | None], groups: Sequence[int], *, num_groups: int | None = None
) -> Tensor:
    """Sum of squares of all elements of each group of tensors.

    ``out[g] = sum over tensors t with groups[t] = g of ||t||^2``: the norms of gradients and
    parameters in the conditional learning speed of Wu et al., "Characterizing and Overcoming the
    Greedy Nature of Learning in Multi-modal Deep Neural Networks" (ICML 2022).

    Args:
        tensors: T floating point tensors of any shape, on one device, or None.
        groups: T group numbers, from 0 on.
        num_groups: G; default the largest group number plus 1.

    Returns:
        float64 ``[G]``, computed in float64, on the device of the first tensor; 0 for a group
        that is empty or has only None and empty tensors.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> reference.squared_norms([torch.tensor([3.0, 4.0]), None, torch.ones(4)], [0, 0, 2])
        tensor([25.,  0.,  4.], dtype=torch.float64)
    """
    if num_groups is None:
        num_groups = max(groups, default=-1) + 1
    device = next((t.device for t in tensors if t is not None), torch.device("cpu"))
    parts: list[list[Tensor]] = [[] for _ in range(num_groups)]
    for tensor, group in zip(tensors, groups, strict=True):
        if tensor is not None:
            parts[group].append(torch.linalg.vector_norm(tensor, dtype=torch.float64).square())
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([torch.stack(part).sum() if part else zero for part in parts])
