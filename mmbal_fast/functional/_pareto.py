"""The gradients of two losses, combined so that neither is worked against."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mmbal_fast import _backend, reference
from mmbal_fast.functional import _checks, _memory
from mmbal_fast.functional._operation import Operation

OP = "pareto_"
Tensors = Sequence[Tensor | None]


def pareto_(
    grads: Tensors,
    own: Tensors,
    modality: Sequence[int],
    modalities: int,
    *,
    gamma: float | Tensor = 1.5,
    dots: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Combines the gradients of two losses so that neither is worked against, in place.

    Wei, Hu, "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance" (ICML 2024),
    algorithm 1: with ``g1`` of the fused loss, ``g2`` of a modality's own, and dot products over
    all gradients of the modality::

        c = 1/2                                        where cos(g1, g2) > 0
        c = (g2.g2 - g1.g2) / |g1 - g2|^2              else: the shortest convex combination
        h = 2 (c g1 + (1 - c) g2)
        G = g1 + g2 <- gamma h max(1, |G| / |h|)       the last factor for each tensor

    with ``c`` kept to 0.001 and 0.999 at the ends, as in the released code. Two launches: one reads
    both lists for the dot products, whose last block derives all coefficients, one reads both and
    writes. Where there is no conflict the second one reads ``grads`` alone. Nothing is read by the
    host. Dot products in float64, the same bits for any thread count; elements are computed in
    float64 for float64, else in float32, with one rounding.

    Args:
        grads: T tensors ``G`` of float32, float64, float16 or bfloat16, of any shape and layout,
            or None; written in place. A float16 result saturates where the gradient was finite.
        own: T tensors ``g2`` of the same shapes and dtypes, or None.
        modality: T positions from 0 to ``modalities`` - 1.
        modalities: M.
        gamma: factor of the result, from 0 on; default 1.5, as in the authors' code. A number or,
            so that it may change without compiling a graph again, a float64 tensor ``[]`` on the
            CPU.
        dots: float64 ``[T, 3]``, as `gradient_dots` gives them of ``grads`` and ``own``; for shards
            those of the whole tensors. By default they are measured here.
        scale: float32 ``[]`` on the device of the gradients, or None: a loss scale that ``grads``
            are free of already, and ``own`` not.

    Returns:
        float64 ``[2, M]`` on the device of the first gradient: cosines, 0 where a gradient is zero,
        and weights ``c``. The weight is NaN, and the gradients of the modality stay as they are,
        where one of them is not finite. Pairs where one is None or empty count for nothing.

    Raises:
        TypeError: no lists or tuples; a tensor that is sparse, complex, integer or on the meta
            device.
        RuntimeError: a tensor whose elements share memory.
        ValueError: lists of different length; a pair that differs in shape, dtype or device; a
            modality out of range; a gradient that shares memory with another tensor; ``gamma``
            negative or not finite; ``dots`` or ``scale`` of another shape, dtype or device.

    Example:
        >>> import torch
        >>> from mmbal_fast import functional
        >>> total, own = torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 1.0])  # g1 = (1, 0)
        >>> functional.pareto_([total], [own], [0], 1)
        tensor([[-0.7071],
                [ 0.6000]], dtype=torch.float64)
        >>> total
        tensor([0.6708, 1.3416])
    """
    modalities = _checks.integer(OP, "modalities", modalities, 1, 2**31 - 1)
    gamma = _checks.setting(OP, "gamma", gamma)
    return operation(grads, own, modality, modalities, gamma, dots, scale)


def _native(
    native: ModuleType,
    grads: Tensors,
    own: Tensors,
    modality: Sequence[int],
    modalities: int,
    gamma: float | Tensor,
    dots: Tensor | None,
    scale: Tensor | None,
    names: Sequence[str] | None = None,
) -> Tensor:
    out = torch.empty(2, modalities, dtype=torch.float64, device=_checks.device_of(grads))
    unfit = native.pareto_(
        grads,
        own,
        modality,
        _checks.number(OP, "gamma", gamma),
        dots,
        scale,
        out,
        names,
        torch.get_num_threads(),
        _backend.workspace,
    )
    if unfit is True:  # several devices, or nothing to combine
        return _reference(grads, own, modality, modalities, gamma, dots, scale, names)
    if unfit is not None:
        _memory.require_apart(OP, names, grads=grads, own=own)
        total, second = _memory.packed(unfit, grads, own)
        out = _native(native, total, second, modality, modalities, gamma, dots, scale, names)
        _memory.unpack_(grads, unfit, total)
    return out


def _reference(
    grads: Tensors,
    own: Tensors,
    modality: Sequence[int],
    modalities: int,
    gamma: float | Tensor,
    dots: Tensor | None,
    scale: Tensor | None,
    names: Sequence[str] | None = None,
) -> Tensor:
    _checks.sequence(OP, "grads", grads)
    _checks.sequence(OP, "own", own)
    used = _checks.companions(OP, names, grads=grads, own=own)
    modality = _checks.one_for_each(OP, "modality", modality, "gradient", len(grads))
    _checks.modalities(OP, modality, grads, used, modalities, names)
    for index in used:
        modality[index] = _checks.word(OP, f"modality[{index}]", modality[index])
    _memory.require_apart(OP, names, grads=grads, own=own)
    home = _checks.device_of(grads)
    if dots is not None:
        _checks.tensor(OP, "dots", dots, torch.float64, [len(grads), 3], home)
    if scale is not None:
        _checks.tensor(OP, "scale", scale, torch.float32, None, home)
    number = _checks.number(OP, "gamma", gamma)
    return reference.pareto_(grads, own, modality, modalities, gamma=number, dots=dots, scale=scale)


operation = Operation(
    "pareto_(Tensor(a!)[] grads, Tensor[] own, int[] modality, int modalities, Tensor gamma, "
    "Tensor? dots, Tensor? scale) -> Tensor",
    device=lambda grads, *_: _checks.device_of(grads),
    native=_native,
    reference=_reference,
    fake=lambda grads, own, modality, modalities, *_: grads[0].new_empty(
        (2, modalities), dtype=torch.float64
    ),
)
"""`pareto_`; in eager calls ``names=`` are what errors call the gradients."""
