"""`squared_norms`: checks, then the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmbal_fast import reference


def squared_norms(
    tensors: Sequence[Tensor | None], groups: Sequence[int], *, num_groups: int | None = None
) -> Tensor:
    """Sum of squares of all elements of each group of tensors.

    ``out[g] = sum over tensors t with groups[t] = g of ||t||^2``: the norms of gradients and
    parameters in the conditional learning speed of Wu et al., "Characterizing and Overcoming the
    Greedy Nature of Learning in Multi-modal Deep Neural Networks" (ICML 2022).

    Args:
        tensors: T floating point tensors of any shape and dtype, on one device, or None.
        groups: T group numbers, from 0 on.
        num_groups: G; default the largest group number plus 1.

    Returns:
        float64 ``[G]`` on the device of the tensors, accumulated in float64; 0 for a group that is
        empty or has only None and empty tensors. Never read by the host.

    Raises:
        ValueError: not one group for each tensor, a group number outside [0, G), or tensors on
            different devices.
        TypeError: a tensor that is sparse, on the meta device, or not real floating point.

    Example:
        >>> import torch
        >>> from mmbal_fast import functional
        >>> functional.squared_norms([torch.tensor([3.0, 4.0]), None, torch.ones(4)], [0, 0, 2])
        tensor([25.,  0.,  4.], dtype=torch.float64)
    """
    op = "squared_norms"
    if len(groups) != len(tensors):
        raise ValueError(
            f"{op}: groups must hold one number for each tensor "
            f"(got {len(groups)} for {len(tensors)} tensors)"
        )
    bound = max(groups, default=-1) + 1 if num_groups is None else num_groups
    if bound < 1:
        raise ValueError(f"{op}: there must be at least one group (got {bound})")
    for index, group in enumerate(groups):
        if not 0 <= group < bound:
            raise ValueError(
                f"{op}: group numbers must be in [0, {bound}) (got {group} for tensor {index})"
            )
    device: torch.device | None = None
    for index, tensor in enumerate(tensors):
        if tensor is None:
            continue
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: tensors must be dense (got {tensor.layout} for tensor {index})")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{op}: tensors must be floating point (got {tensor.dtype} for tensor {index})"
            )
        if tensor.is_meta:
            raise TypeError(f"{op}: tensors must hold data (got tensor {index} on device meta)")
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            raise ValueError(
                f"{op}: tensors must be on one device "
                f"(got {tensor.device} for tensor {index} after {device})"
            )
    return reference.squared_norms(tensors, groups, num_groups=bound)
