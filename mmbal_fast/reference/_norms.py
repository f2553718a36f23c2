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


@torch.no_grad()
def accumulate_speeds_(
    moments: Tensor, membership: Tensor, totals: Tensor, active: Tensor | None
) -> Tensor:
    """Adds ``|gradients|^2 / |weights|^2`` of each group to its total, where all are finite.

    Args:
        moments: float64 ``[2, T, 3]``, rows ``(count, mean, M2)`` of T weights, and of their
            gradients.
        membership: float64 ``[G, T]``, how often a tensor counts in a group; 0 is not at all.
        totals: float64 ``[G]``, written in place.
        active: bool ``[]`` or None; where false nothing is added.

    Returns:
        bool ``[]``: whether all ratios are finite.
    """
    count, mean, m2 = moments.unbind(2)
    norms = m2 + count * mean.square()
    chosen = membership.unsqueeze(1)
    # Not a matrix product: 0 * inf would spoil the groups that a tensor is not in.
    weights, gradients = torch.where(chosen > 0, chosen * norms, 0.0).sum(2).unbind(1)
    ratios = gradients / weights
    finite = ratios.isfinite().all()
    add = finite if active is None else finite & active
    totals.copy_(torch.where(add, totals + ratios, totals))
    return finite
