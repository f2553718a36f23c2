"""Noise as a pure function of (seed, step, tensor id, element index)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2**20
"""Elements handled at a time: bounds the memory that float64 and int64 intermediates take."""

_MASK = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32, a counter-based generator.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.3.

    Args:
        counter: four words, int64 tensors of values 0 to 2^32 - 1 that broadcast.
        key: two words, 0 to 2^32 - 1.
        rounds: number of rounds, default 10 as the paper recommends.

    Returns:
        Four words like the counter's.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # A 32 x 32 bit product wraps in int64, but all its 64 bits are there: mask after shifting.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniform_words(
    start: int,
    count: int,
    *,
    seed: int,
    step: int | Tensor,
    tensor_id: int,
    device: torch.device,
) -> Tensor:
    """Random 32-bit words of the elements ``start`` to ``start + count - 1`` of one tensor.

    Args:
        start: global index of the first element, 64-bit.
        count: number of elements.
        seed: 64-bit seed.
        step: step number (its low 32 bits count), an int or an integer tensor of one element.
        tensor_id: 32-bit id of the tensor.
        device: where the result lives.

    Returns:
        int64 ``[count]``, values 0 to 2^32 - 1.
    """
    first = start >> 2
    words = _blocks(first, (start + count + 3) >> 2, seed, step, tensor_id, device)
    return words.flatten()[start - 4 * first :][:count]


def normals(
    start: int,
    count: int,
    *,
    seed: int,
    step: int | Tensor,
    tensor_id: int,
    device: torch.device,
) -> Tensor:
    """Standard normals of the elements ``start`` to ``start + count - 1`` of one tensor.

    Args:
        start: as for `uniform_words`.
        count: as for `uniform_words`.
        seed: as for `uniform_words`.
        step: as for `uniform_words`.
        tensor_id: as for `uniform_words`.
        device: as for `uniform_words`.

    Returns:
        float32 ``[count]``.
    """
    first = start >> 2
    words = _blocks(first, (start + count + 3) >> 2, seed, step, tensor_id, device)
    unit = (words.double() + 0.5) * 2.0**-32
    radius = (-2.0 * unit[:, 0::2].log()).sqrt()
    theta = 2.0 * math.pi * unit[:, 1::2]
    lanes = torch.stack([radius * theta.cos(), radius * theta.sin()], dim=2)
    return lanes.flatten()[start - 4 * first :][:count].float()


def _blocks(
    first: int, end: int, seed: int, step: int | Tensor, tensor_id: int, device: torch.device
) -> Tensor:
    """Four words of each block, int64 ``[end - first, 4]``."""
    block = torch.arange(end - first, device=device) + first
    stream = torch.full_like(block, tensor_id & _MASK)
    if isinstance(step, Tensor):
        now = step.to(device=device, dtype=torch.int64) & _MASK
    else:
        now = torch.full_like(block, step & _MASK)
    words = philox4x32(
        (block & _MASK, (block >> 32) & _MASK, stream, now),
        key=(seed & _MASK, (seed >> 32) & _MASK),
    )
    return torch.stack(words, dim=1)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of the dimensions."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != extent:
            return False
        extent *= size
    return True


def flat(tensor: Tensor) -> Tensor:
    """The elements in the order in which they are counted.

    Memory order if the tensor is dense (for a contiguous tensor that is the logical order), and
    then a view; logical order otherwise, and then possibly a copy.
    """
    if is_dense(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.reshape(-1)


def chunks(count: int) -> Iterator[slice]:
    """Slices of at most `CHUNK` elements that cover ``count`` elements."""
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))


@torch.no_grad()
def noise_like(
    tensor: Tensor, *, seed: int, step: int | Tensor, tensor_id: int = 0, offset: int = 0
) -> Tensor:
    """Standard normal noise that depends on nothing but its arguments.

    Philox4x32-10 with the key ``seed`` and the counter ``(block, tensor_id, step)``, four elements
    to a block, then Box-Muller on pairs of words. No generator of torch is read or advanced, and
    the numbers do not depend on device, chunking or sharding.

    Elements count in logical order if ``tensor`` is contiguous, in memory order if it is dense in
    another layout (channels_last, transposed), and in logical order if it has gaps.

    Args:
        tensor: floating point, any shape; gives shape, dtype, device and layout. Not read.
        seed: 64-bit seed.
        step: step number, an int or an integer tensor of one element; its low 32 bits count.
        tensor_id: 32-bit id of the tensor.
        offset: global index of the tensor's first element, for shards.

    Returns:
        A tensor like ``tensor``; computed in float64, rounded to float32, then to its dtype.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> whole = reference.noise_like(torch.empty(10), seed=7, step=3)
        >>> shard = reference.noise_like(torch.empty(6), seed=7, step=3, offset=4)
        >>> torch.equal(whole[4:], shard)
        True
    """
    out = torch.empty_like(tensor)
    # The input decides the order: empty_like closes the gaps of a tensor that is not dense.
    values = flat(out) if is_dense(tensor) else torch.empty_like(out.reshape(-1))
    for piece in chunks(tensor.numel()):
        values[piece] = normals(
            offset + piece.start,
            piece.stop - piece.start,
            seed=seed,
            step=step,
            tensor_id=tensor_id,
            device=tensor.device,
        )
    return out if is_dense(tensor) else out.copy_(values.view(out.shape))
