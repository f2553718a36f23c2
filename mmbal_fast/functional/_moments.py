"""Count, mean and sum of squared deviations of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmbal_fast import _backend, reference
from mmbal_fast.functional import _checks


def gradient_moments(grads: Sequence[Tensor | None]) -> Tensor:
    """Count, mean and sum of squared deviations of each gradient, in one launch.

    Chan's formula merges such rows from shards; ``sqrt(M2 / (count - 1))`` is the unbiased
    standard deviation that scales the noise of OGM-GE (CVPR 2022, section 3.3). One read of
    memory; deterministic for any thread count; no sum of squares that cancels.

    Args:
        grads: T tensors of float32, float64, float16 or bfloat16, of any shape and layout, or None.

    Returns:
        float64 ``[T, 3]``, rows ``(count, mean, M2)``, on the device of the first gradient; a row
        of zeros for None and for an empty tensor.

    Raises:
        TypeError: a gradient that is sparse, complex, integer or on the meta device.
        RuntimeError: a gradient whose elements share memory.

    Example:
        >>> import torch
        >>> from mmbal_fast import functional
        >>> functional.gradient_moments([torch.tensor([1.0, 2.0, 6.0]), None])
        tensor([[ 3.,  3., 14.],
                [ 0.,  0.,  0.]], dtype=torch.float64)
    """
    if torch.compiler.is_compiling():
        rows = [index for index, grad in enumerate(grads) if grad is not None]
        kept = [grads[index] for index in rows]
        if len(kept) == len(grads):
            result: Tensor = torch.ops.mmbal.gradient_moments(kept)
            return result
        device = next((grad.device for grad in grads if grad is not None), None)
        moments = torch.zeros(len(grads), 3, dtype=torch.float64, device=device)
        if kept:
            moments[rows] = torch.ops.mmbal.gradient_moments(kept)
        return moments
    return gradient_moments_eager(grads)


@torch.no_grad()
def gradient_moments_eager(
    grads: Sequence[Tensor | None],
    names: Sequence[str] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`gradient_moments`; errors call the gradients by ``names``.

    ``out`` is written and returned if it can be; its rows of None and of empty tensors stay as they
    are.
    """
    op = "gradient_moments"
    device = next((grad.device for grad in grads if grad is not None), torch.device("cpu"))
    native = _backend.runs(device)
    if native is None:
        _checks.gradients(op, grads, names)
        return reference.gradient_moments(grads)
    moments = torch.zeros(len(grads), 3, dtype=torch.float64, device=device) if out is None else out
    unfit = native.moments(grads, moments, names, torch.get_num_threads(), _backend.workspace)
    if unfit is None:
        return moments
    if unfit is True:  # several devices
        _checks.gradients(op, grads, names)
        for index, grad in enumerate(grads):
            if grad is not None:
                moments[index] = gradient_moments_eager([grad])[0].to(device)
        return moments
    dense = list(grads)
    for index in unfit:
        gapped = grads[index]
        assert gapped is not None
        dense[index] = gapped.contiguous()
    return gradient_moments_eager(dense, names)
