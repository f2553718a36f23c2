"""Noise as a pure function of seed, step, tensor and element."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mmbal_fast import reference
from mmbal_fast.functional import _checks
from mmbal_fast.functional._operation import Operation


def noise_like(
    tensor: Tensor, *, seed: int, step: int | Tensor, tensor_id: int = 0, offset: int = 0
) -> Tensor:
    """Standard normal noise that depends on nothing but its arguments.

    Philox4x32-10 with the key ``seed`` and the counter ``(block, tensor_id, step)``, four elements
    to a block, then Box-Muller on pairs of words. No generator of torch is read or advanced, and
    the numbers do not depend on device, thread count, instruction set, chunking or sharding.

    Elements count in logical order if ``tensor`` is contiguous, in memory order if it is dense in
    another layout (channels_last, transposed), and in logical order if it has gaps.

    Args:
        tensor: float32, float64, float16 or bfloat16, any shape; gives shape, dtype, device and
            layout. Not read.
        seed: 64-bit seed.
        step: step number, an int or an int64 tensor of one element on the device of ``tensor``; its
            low 32 bits count.
        tensor_id: 32-bit id of the tensor.
        offset: global index of the tensor's first element, for shards; >= 0.

    Returns:
        A tensor like ``tensor``: float32 normals, rounded to its dtype.

    Raises:
        TypeError: another dtype.
        ValueError: a seed, id or offset out of range.

    Example:
        >>> import torch
        >>> from mmbal_fast import functional
        >>> whole = functional.noise_like(torch.empty(8), seed=1, step=0)
        >>> shard = functional.noise_like(torch.empty(3), seed=1, step=0, offset=5)
        >>> torch.equal(whole[5:], shard)
        True
    """
    op = "noise_like"
    _checks.dense_floats(op, "tensor", tensor)
    seed = _checks.word64(op, "seed", seed)
    _checks.tensor_id(op, "tensor_id", tensor_id)
    _checks.offset(op, "offset", offset, tensor.numel())
    _checks.step(op, step, tensor.device)
    number, counter = (0, step) if isinstance(step, Tensor) else (step, None)
    return _operation(tensor, seed, number, counter, tensor_id, offset)


def _native(
    native: ModuleType,
    tensor: Tensor,
    seed: int,
    step: int,
    counter: Tensor | None,
    tensor_id: int,
    offset: int,
) -> Tensor:
    out = torch.empty_like(tensor, requires_grad=False)
    if out.stride() != tensor.stride():  # gaps, which empty_like closes: logical order counts
        packed = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return out.copy_(_native(native, packed, seed, step, counter, tensor_id, offset))
    now = step if counter is None else counter
    native.noise_(out, seed % 2**64, now, tensor_id, offset, torch.get_num_threads())
    return out


def _reference(
    tensor: Tensor, seed: int, step: int, counter: Tensor | None, tensor_id: int, offset: int
) -> Tensor:
    now = step if counter is None else counter
    return reference.noise_like(tensor, seed=seed, step=now, tensor_id=tensor_id, offset=offset)


_operation = Operation(
    "noise_like(Tensor tensor, int seed, int step, Tensor? counter, int tensor_id, int offset) "
    "-> Tensor",
    device=lambda tensor, *_: tensor.device,
    native=_native,
    reference=_reference,
    fake=lambda tensor, *_: torch.empty_like(tensor),
)
