"""Count, mean and sum of squared deviations of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mmbal_fast import _backend, reference
from mmbal_fast.functional import _checks
from mmbal_fast.functional._operation import Operation


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
    _checks.sequence("gradient_moments", "grads", grads)
    return moments_of(grads)


def _native(
    native: ModuleType,
    grads: Sequence[Tensor | None],
    *,
    names: Sequence[str] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    moments = out
    if moments is None:
        moments = torch.zeros(len(grads), 3, dtype=torch.float64, device=_checks.device_of(grads))
    unfit = native.moments(grads, moments, names, torch.get_num_threads(), _backend.workspace)
    if unfit is True:  # several devices
        _checks.gradients("gradient_moments", grads, names)
        for index, grad in enumerate(grads):
            if grad is not None:
                moments[index] = moments_of.run([grad])[0].to(moments.device)
    elif unfit is not None:  # gaps between the elements, or negated
        dense = list(grads)
        for index in unfit:
            dense[index] = dense[index].resolve_neg().contiguous()
        return _native(native, dense, names=names, out=moments)
    return moments


def _reference(
    grads: Sequence[Tensor | None],
    *,
    names: Sequence[str] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    _checks.gradients("gradient_moments", grads, names)
    moments = reference.gradient_moments(grads)
    return moments if out is None else out.copy_(moments)


moments_of = Operation(
    "gradient_moments(Tensor[] grads) -> Tensor",
    device=_checks.device_of,
    native=_native,
    reference=_reference,
    fake=lambda grads: grads[0].new_empty((len(grads), 3), dtype=torch.float64),
)
"""`gradient_moments`; for eager calls with ``names`` that errors call the gradients, and ``out``.

``out`` is written and returned. Its rows of None and of empty tensors stay as they are.
"""
