"""Dot products over pairs of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mmbal_fast import _backend, reference
from mmbal_fast.functional import _checks, _memory
from mmbal_fast.functional._operation import Operation

OP = "gradient_dots"


def gradient_dots(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Tensor:
    """``(g1 . g1, g1 . g2, g2 . g2)`` of each pair of gradients, in one launch.

    What decides whether two losses agree about a parameter, and how their gradients are combined:
    ``cos = g1 . g2 / (|g1| |g2|)`` in Wei, Hu, "MMPareto: Boosting Multimodal Learning with
    Innocent Unimodal Assistance" (ICML 2024), section 3.3. Sum the rows for parameters that count
    as one. One read of memory; deterministic for any thread count; summed in float64.

    Args:
        first: T gradients of one loss: float32, float64, float16 or bfloat16, of any shape and
            layout, or None.
        second: those of the same parameters from another loss: the same shapes and dtypes.

    Returns:
        float64 ``[T, 3]`` on the device of the first gradient; a row of zeros where one of the pair
        is None or empty.

    Raises:
        TypeError: no lists or tuples; a gradient that is sparse, complex, integer or on the meta
            device.
        RuntimeError: a gradient whose elements share memory.
        ValueError: lists of different length, or a pair that differs in shape, dtype or device.

    Example:
        >>> import torch
        >>> from mmbal_fast import functional
        >>> first, second = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])
        >>> functional.gradient_dots([first, None], [second, second])
        tensor([[25.,  3.,  1.],
                [ 0.,  0.,  0.]], dtype=torch.float64)
    """
    _checks.sequence(OP, "first", first)
    _checks.sequence(OP, "second", second)
    return _operation(first, second)


def _native(
    native: ModuleType, first: Sequence[Tensor | None], second: Sequence[Tensor | None]
) -> Tensor:
    dots = torch.zeros(len(first), 3, dtype=torch.float64, device=_checks.device_of(first))
    unfit = native.gradient_dots(first, second, dots, torch.get_num_threads(), _backend.workspace)
    if unfit is True:  # several devices
        for index, pair in enumerate(zip(first, second, strict=True)):
            if None not in pair:
                dots[index] = _operation.run(*([each] for each in pair))[0].to(dots.device)
    elif unfit is not None:  # gaps between the elements, negated, or two layouts
        return _native(native, *_memory.packed(unfit, first, second))
    return dots


def _reference(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Tensor:
    _checks.companions(OP, None, first=first, second=second)
    return reference.gradient_dots(first, second)


_operation = Operation(
    "gradient_dots(Tensor[] first, Tensor[] second) -> Tensor",
    device=lambda first, _: _checks.device_of(first),
    native=_native,
    reference=_reference,
    fake=lambda first, second: first[0].new_empty((len(first), 3), dtype=torch.float64),
)
