"""Sums of squares of groups of tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from mmbal_fast import _backend, reference
from mmbal_fast.functional import _checks
from mmbal_fast.functional._gradient_moments import gradient_moments
from mmbal_fast.functional._operation import in_graph


@torch.no_grad()
def squared_norms(
    tensors: Sequence[Tensor | None], groups: Sequence[int], *, num_groups: int | None = None
) -> Tensor:
    """Sum of squares of all elements of each group of tensors.

    ``out[g] = sum over tensors t with groups[t] = g of ||t||^2``: the norms of gradients and
    parameters in the conditional learning speed of Wu et al., "Characterizing and Overcoming the
    Greedy Nature of Learning in Multi-modal Deep Neural Networks" (ICML 2022). One read of memory,
    by the kernel of `gradient_moments`: ``||t||^2 = count * mean^2 + M2``.

    Args:
        tensors: T tensors of float32, float64, float16 or bfloat16, of any shape and layout, or
            None.
        groups: T group numbers, from 0 on.
        num_groups: G; default the largest group number plus 1.

    Returns:
        float64 ``[G]`` on the device of the first tensor, as accurate as `gradient_moments`; 0 for
        a group that is empty or has only None and empty tensors. Never read by the host.

    Raises:
        ValueError: not one group for each tensor, or a group number outside [0, G).
        TypeError: a tensor that is sparse, on the meta device, or of another dtype.
        RuntimeError: a tensor whose elements share memory.

    Example:
        >>> import torch
        >>> from mmbal_fast import functional
        >>> functional.squared_norms([torch.tensor([3.0, 4.0]), None, torch.ones(4)], [0, 0, 2])
        tensor([25.,  0.,  4.], dtype=torch.float64)
    """
    op = "squared_norms"
    _checks.sequence(op, "tensors", tensors)
    groups = _checks.integers(op, "groups", groups, "tensor", len(tensors))
    if num_groups is None:
        bound = max(groups, default=-1) + 1
    else:
        bound = _checks.integer(op, "num_groups", num_groups, 0, 2**31 - 1)
    if bound < 1:
        raise ValueError(f"{op}: there must be at least one group (got {bound})")
    if min(groups, default=0) < 0 or max(groups, default=0) >= bound:
        raise ValueError(f"{op}: groups must be in [0, {bound}) (got {groups})")
    device = _checks.device_of(tensors)
    if _backend.runs(device) is None:
        _checks.gradients(op, tensors, None)
        return reference.squared_norms(tensors, groups, num_groups=bound)
    try:
        count, mean, m2 = gradient_moments(tensors).unbind(1)
    except (TypeError, RuntimeError):
        _checks.gradients(op, tensors, None)  # the same, under this operation's name
        raise
    members = _members if in_graph() else _kept_members
    chosen = members(tuple(groups), bound, device)
    return torch.where(chosen, torch.addcmul(m2, count * mean, mean), 0.0).sum(1)


def _members(groups: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Which tensors are in which group, bool ``[G, T]``."""
    numbers = torch.arange(count, dtype=torch.int64, device="cpu").unsqueeze(1)
    return (numbers == torch.tensor(groups, dtype=torch.int64, device="cpu")).to(device)


# Kept, so that a step copies nothing to the device.
_kept_members = functools.lru_cache(maxsize=16)(_members)
