"""A pull towards earlier weights, and the squares of what it makes of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mmbal_fast import _backend, reference
from mmbal_fast.functional import _checks, _memory
from mmbal_fast.functional._operation import Operation

OP = "pull_"
Tensors = Sequence[Tensor | None]


def pull_(
    grads: Tensors,
    weights: Tensors,
    anchors: Tensors,
    coefficients: Tensor,
    modality: Sequence[int],
) -> Tensor:
    """``g <- g + beta_m (theta - anchor)`` in place, and the squares of the result, in one launch.

    The gradient of ``beta_m / 2 |theta - anchor|^2`` beside that of the loss: the regulation of
    Huang et al., "Adaptive Unimodal Regulation for Balanced Multimodal Information Acquisition"
    (CVPR 2025), whose Fisher trace is made of the squares. Float64 is computed in float64, others
    in float32, with one rounding; the squares are of what is written, summed in float64, the same
    bits for any thread count. One read of all three and one write; where ``beta_m`` is 0 only the
    gradients are read. Nothing is read by the host.

    Args:
        grads: T tensors of float32, float64, float16 or bfloat16, of any shape and layout, or
            None; written in place. A float16 result saturates where the gradient was finite.
        weights: T parameters ``theta`` of the same shapes and dtypes, or None.
        anchors: T tensors of the same shapes and dtypes, or None.
        coefficients: float32 ``[M]``, ``beta``; NaN counts as 0. Finite ones only keep finite
            gradients finite.
        modality: T indexes into ``coefficients``.

    Returns:
        float64 ``[T]`` on the device of the first gradient: the sum of the squares of each
        gradient, then; 0 where one of the three is None or empty, and left alone.

    Raises:
        TypeError: no lists or tuples; a tensor that is sparse, complex, integer or on the meta
            device.
        RuntimeError: a tensor whose elements share memory.
        ValueError: lists of different length; tensors of one position that differ in shape, dtype
            or device; a modality out of range; a gradient that shares memory with another tensor;
            coefficients that are elsewhere.

    Example:
        >>> import torch
        >>> from mmbal_fast import functional
        >>> g, theta, anchor = torch.tensor([[1.0, 2.0], [3.0, 0.0], [1.0, 1.0]])
        >>> functional.pull_([g], [theta], [anchor], torch.tensor([0.5]), [0])
        tensor([6.2500], dtype=torch.float64)
        >>> g
        tensor([2.0000, 1.5000])
    """
    if not isinstance(coefficients, Tensor):
        raise TypeError(f"{OP}: coefficients must be a tensor (got {type(coefficients).__name__})")
    return operation(grads, weights, anchors, coefficients, modality)


def _native(
    native: ModuleType,
    grads: Tensors,
    weights: Tensors,
    anchors: Tensors,
    coefficients: Tensor,
    modality: Sequence[int],
    names: Sequence[str] | None = None,
) -> Tensor:
    squares = torch.zeros(len(grads), dtype=torch.float64, device=_checks.device_of(grads))
    unfit = native.pull_(
        grads,
        weights,
        anchors,
        coefficients,
        modality,
        squares,
        names,
        torch.get_num_threads(),
        _backend.workspace,
    )
    if unfit is True:  # several devices
        return _reference(grads, weights, anchors, coefficients, modality, names)
    if unfit is not None:
        _memory.require_apart(OP, names, grads=grads, weights=weights, anchors=anchors)
        g, theta, anchor = _memory.packed(unfit, grads, weights, anchors)
        squares = _native(native, g, theta, anchor, coefficients, modality, names)
        _memory.unpack_(grads, unfit, g)
    return squares


def _reference(
    grads: Tensors,
    weights: Tensors,
    anchors: Tensors,
    coefficients: Tensor,
    modality: Sequence[int],
    names: Sequence[str] | None = None,
) -> Tensor:
    for name, each in (("grads", grads), ("weights", weights), ("anchors", anchors)):
        _checks.sequence(OP, name, each)
    used = _checks.companions(OP, names, grads=grads, weights=weights, anchors=anchors)
    modality = _checks.one_for_each(OP, "modality", modality, "gradient", len(grads))
    k, home = coefficients, coefficients.device
    _checks.tensor(OP, "coefficients", k, torch.float32, [k.numel()], home)
    _checks.modalities(OP, modality, grads, used, len(k), names)
    for index in used:
        modality[index] = _checks.word(OP, f"modality[{index}]", modality[index])
    _memory.require_apart(OP, names, grads=grads, weights=weights, anchors=anchors)
    return reference.pull_(grads, weights, anchors, coefficients, modality)


operation = Operation(
    "pull_(Tensor(a!)[] grads, Tensor[] weights, Tensor[] anchors, Tensor coefficients, "
    "int[] modality) -> Tensor",
    device=lambda grads, weights, anchors, coefficients, modality: coefficients.device,
    native=_native,
    reference=_reference,
    fake=lambda grads, *_: grads[0].new_empty(len(grads), dtype=torch.float64),
)
"""`pull_`; in eager calls ``names=`` are what errors call the gradients."""
