"""The in-place update of OGM-GE."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbal_fast import _backend, reference
from mmbal_fast.functional import _checks, _memory
from mmbal_fast.functional._gradient_moments import moments_of
from mmbal_fast.functional._operation import Operation, in_graph

EPS = 1e-8
"""Added to the standard deviation, as in the released code of OGM-GE."""

NON_FINITE_GRADIENT = 1
LABEL_OUT_OF_RANGE = 2
"""Bits of the status word, as in csrc/math/modulation.h."""


def modulate_(
    grads: Sequence[Tensor | None],
    coefficients: Tensor,
    modality: Sequence[int],
    *,
    noise: float | Tensor = 1.0,
    seed: int = 0,
    step: int | Tensor = 0,
    tensor_ids: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    moments: Tensor | None = None,
    eps: float = EPS,
    status: Tensor | None = None,
    error_if_nonfinite: bool = False,
) -> None:
    """Scale gradients in place and add noise of their own standard deviation.

    ``g <- k_m g + noise * (std(g) + eps) * z`` with standard normal ``z`` (see `noise_like`) and
    the unbiased ``std`` of all elements of the gradient before scaling: OGM-GE (CVPR 2022), section
    3.3; without noise OGM, section 3.2. Equivalent to::

        for g, m in zip(grads, modality):
            g.mul_(coefficients[m]).add_(torch.randn_like(g) * (g.std() + eps))

    with ``std`` taken first, in two launches on CUDA and one read and one write of memory on the
    CPU. Nothing is read back to the host. Float64 gradients are computed in float64, others in
    float32, with one rounding to their dtype. None and empty tensors are skipped; a tensor that is
    listed twice is updated once.

    A gradient with NaN or inf is only scaled, and so is one so large that noise could overflow its
    type. A float16 result saturates at +-65504 where the gradient was finite.

    Args:
        grads: T tensors of float32, float64, float16 or bfloat16, of any shape and layout, or
            None; written in place. Types and devices may differ.
        coefficients: float32 ``[M]``; NaN counts as 1.
        modality: T indexes into ``coefficients``.
        noise: factor of the noise, default 1 as in OGM-GE; 0 gives exactly ``k_m g``. A number, or
            one that changes without compiling a graph again, a float64 tensor ``[]`` on the CPU.
        seed: 64-bit seed of the noise.
        step: step number, an int or an int64 tensor of one element on the device of the gradients;
            its low 32 bits count.
        tensor_ids: T 32-bit ids, by default the positions 0 to T - 1.
        offsets: T global indexes of the tensors' first elements, by default 0; for shards.
        moments: float64 ``[T, 3]``, rows ``(count, mean, M2)``; by default those of ``grads``. For
            shards give those of the whole tensors.
        eps: added to the standard deviation, default 1e-8 as in the released code.
        status: int32 ``[1]`` on the device of the gradients, or None; bit 1 is set if a gradient is
            not finite.
        error_if_nonfinite: read the moments back to the host and raise before anything is written.

    Raises:
        TypeError: a gradient that is sparse, complex, integer or on the meta device.
        RuntimeError: a gradient whose elements share memory; with ``error_if_nonfinite``, a
            gradient that holds NaN or inf.
        ValueError: lists of different length, a modality out of range, the same memory in two
            modalities, negative ``noise`` or ``eps``, tensors that are on the CPU beside others
            that are not.

    Example:
        >>> import torch
        >>> from mmbal_fast import functional
        >>> audio, image = torch.ones(2), torch.ones(2)
        >>> functional.modulate_([audio, image], torch.tensor([0.25, 1.0]), [0, 1], noise=0.0)
        >>> audio, image
        (tensor([0.2500, 0.2500]), tensor([1., 1.]))
    """
    op = "modulate_"
    if not isinstance(coefficients, Tensor):
        raise TypeError(f"{op}: coefficients must be a tensor (got {type(coefficients).__name__})")
    noise = _checks.setting(op, "noise", noise)
    eps = _checks.number(op, "eps", eps)
    seed = _checks.word64(op, "seed", seed)
    if error_if_nonfinite:
        moments = finite_moments(op, grads, moments)
    update_(
        grads,
        coefficients,
        modality,
        noise=noise,
        seed=seed,
        step=step,
        tensor_ids=tensor_ids,
        offsets=offsets,
        moments=moments,
        eps=eps,
        status=status,
    )


def finite_moments(
    op: str,
    grads: Sequence[Tensor | None],
    moments: Tensor | None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Moments of the gradients, read by the host to raise if they are not finite."""
    _checks.sequence(op, "grads", grads)
    _checks.gradients(op, grads, names)
    if moments is None:
        moments = moments_of(grads, names=names)
    else:
        on = moments.device if isinstance(moments, Tensor) else _checks.device_of(grads)
        _checks.tensor(op, "moments", moments, torch.float64, [len(grads), 3], on)
    broken = (~moments[:, 1].isfinite()).nonzero().flatten().tolist()
    if broken:
        which = ", ".join(_checks.label(names, index) for index in broken)
        raise RuntimeError(f"{op}: gradients must be finite (got NaN or inf in {which})")
    return moments


def unscales(device: torch.device) -> bool:
    """Whether `update_` takes ``inverse_scale`` and ``found_inf``: by kernels, in eager calls."""
    return _backend.runs(device) is not None and not in_graph()


def update_(
    grads: Sequence[Tensor | None],
    coefficients: Tensor,
    modality: Sequence[int],
    *,
    noise: float | Tensor = 1.0,
    seed: int = 0,
    step: int | Tensor = 0,
    tensor_ids: Sequence[int] | None = None,
    offsets: Sequence[int] | None = None,
    moments: Tensor | None = None,
    eps: float = EPS,
    status: Tensor | None = None,
    advance: bool = False,
    inverse_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """`modulate_` on checked numbers, with what the step of a training run needs beside it.

    With ``advance`` the tensor ``step`` grows by 1 at the end. Gradients are multiplied by
    ``inverse_scale`` (float32 ``[]``) first, rounded to their type, and ``found_inf`` (float32
    ``[]``) is set to 1 if one is not finite before that; see `unscales`. Errors call the gradients
    by ``names``.
    """
    number, counter = (0, step) if isinstance(step, Tensor) else (step, None)
    _operation(
        grads,
        coefficients,
        modality,
        noise,
        seed,
        number,
        counter,
        tensor_ids,
        offsets,
        moments,
        eps,
        status,
        advance,
        inverse_scale,
        found_inf,
        names=names,
    )


class _Arguments(NamedTuple):
    """What the schema has beside the gradients, in its order, and ``names``."""

    coefficients: Tensor
    modality: Sequence[int]
    noise: float | Tensor
    seed: int
    step: int
    counter: Tensor | None
    tensor_ids: Sequence[int] | None
    offsets: Sequence[int] | None
    moments: Tensor | None
    eps: float
    status: Tensor | None
    advance: bool
    inverse_scale: Tensor | None
    found_inf: Tensor | None
    names: Sequence[str] | None

    @property
    def now(self) -> int | Tensor:
        """The step number."""
        return self.step if self.counter is None else self.counter

    def only(self, kept: Sequence[int], total: int) -> _Arguments:
        """Those of the gradients at the positions ``kept`` of ``total``."""
        ids = range(total) if self.tensor_ids is None else self.tensor_ids
        return self._replace(
            modality=[self.modality[index] for index in kept],
            tensor_ids=[ids[index] for index in kept],
            offsets=None if self.offsets is None else [self.offsets[index] for index in kept],
            moments=None if self.moments is None else self.moments[list(kept)],
            names=None if self.names is None else [self.names[index] for index in kept],
        )


def _native(
    native: ModuleType,
    grads: Sequence[Tensor | None],
    *values: Any,
    names: Sequence[str] | None = None,
) -> None:
    _run(native, grads, _Arguments._make((*values, names)))


def _run(native: ModuleType, grads: Sequence[Tensor | None], given: _Arguments) -> None:
    unfit = native.modulate_(
        grads,
        given.coefficients,
        given.modality,
        _checks.number("modulate_", "noise", given.noise),
        given.seed % 2**64,
        given.now,
        given.tensor_ids,
        given.offsets,
        given.moments,
        given.eps,
        given.status,
        given.advance,
        given.names,
        torch.get_num_threads(),
        _backend.workspace,
        given.inverse_scale,
        given.found_inf,
        _backend.single_launch,
    )
    if unfit is True:
        _per_device_(native, grads, given)
    elif unfit is not None:
        # Tensors with gaps between their elements, and negated views, are updated in a packed copy.
        _memory.distinct("modulate_", grads, given.modality, given.names)
        packed = list(grads)
        copies: dict[object, Tensor] = {}  # one for a tensor that is listed twice
        for index in unfit:
            view: Any = grads[index]
            which = (view.data_ptr(), view.shape, view.stride())
            packed[index] = copies.setdefault(which, view.resolve_neg().contiguous())
        _run(native, packed, given)
        for index in unfit:
            grads[index].copy_(packed[index])


def _per_device_(native: ModuleType, grads: Sequence[Tensor | None], given: _Arguments) -> None:
    groups: dict[torch.device, list[int]] = {}
    for index, grad in enumerate(grads):
        if grad is not None and grad.numel() > 0:
            groups.setdefault(grad.device, []).append(index)
    home = given.coefficients.device
    if any(device.type != home.type for device in groups):
        raise ValueError(
            "modulate_: gradients must be on the kind of device that the coefficients are on "
            f"(got {', '.join(map(str, groups))} and {home})"
        )

    def at(value: Tensor | None, device: torch.device) -> Tensor | None:
        return None if value is None else value.to(device, non_blocking=True)

    # All groups are checked before the first is written.
    given = _checked(grads, given)
    _memory.distinct("modulate_", grads, given.modality, given.names)
    for device, kept in groups.items():
        local = given.only(kept, len(grads))
        status = at(given.status, device)
        _run(
            native,
            [grads[index] for index in kept],
            local._replace(
                coefficients=given.coefficients.to(device, non_blocking=True),
                counter=at(given.counter, device),
                moments=at(local.moments, device),
                status=status,
                advance=False,
            ),
        )
        if given.status is not None and status is not given.status:
            given.status.bitwise_or_(status.to(home))  # type: ignore[union-attr]
    if given.advance:
        given.counter.add_(1)  # type: ignore[union-attr]


def _checked(grads: Sequence[Tensor | None], given: _Arguments) -> _Arguments:
    """Refuses what the native module refuses; integers of other kinds as Python's own."""
    op, total, k = "modulate_", len(grads), given.coefficients
    home = k.device
    lists: dict[str, list[Any]] = {}
    for name in ("modality", "tensor_ids", "offsets"):
        values = getattr(given, name)
        if values is not None or name == "modality":
            lists[name] = _checks.one_for_each(op, name, values, "gradient", total)
    _checks.tensor(op, "coefficients", k, torch.float32, [k.numel()], home)
    _checks.gradients(op, grads, given.names)
    used = [index for index, each in enumerate(grads) if each is not None and each.numel() > 0]
    _checks.modalities(op, lists["modality"], grads, used, len(k), given.names)
    for index in used:
        grad = grads[index]
        assert grad is not None
        numbers = {name: f"{name}[{index}]" for name in lists}
        lists["modality"][index] = _checks.word(op, numbers["modality"], lists["modality"][index])
        if grad.device.type != home.type:
            raise ValueError(
                f"{op}: coefficients must be on the device of the gradients "
                f"(got {home} and {grad.device})"
            )
        if "tensor_ids" in lists:
            value = lists["tensor_ids"][index]
            lists["tensor_ids"][index] = _checks.tensor_id(op, numbers["tensor_ids"], value)
        if "offsets" in lists:
            value = lists["offsets"][index]
            lists["offsets"][index] = _checks.offset(op, numbers["offsets"], value, grad.numel())
    _checks.step(op, given.now, home)
    for name, value, dtype, shape in (
        ("moments", given.moments, torch.float64, [total, 3]),
        ("status", given.status, torch.int32, None),
        ("inverse_scale", given.inverse_scale, torch.float32, None),
        ("found_inf", given.found_inf, torch.float32, None),
    ):
        if value is not None:
            _checks.tensor(op, name, value, dtype, shape, home)
    return given._replace(
        modality=lists["modality"],
        tensor_ids=lists.get("tensor_ids"),
        offsets=lists.get("offsets"),
    )


def _reference(
    grads: Sequence[Tensor | None], *values: Any, names: Sequence[str] | None = None
) -> None:
    op = "modulate_"
    grads = tuple(grads)
    given = _checked(grads, _Arguments._make((*values, names)))
    total = len(grads)
    kept = _memory.distinct(op, grads, given.modality, given.names)
    local = given.only(kept, total)
    mine = [grads[index] for index in kept]
    moments = local.moments
    noise = _checks.number(op, "noise", local.noise)
    if moments is None and (noise != 0 or given.status is not None):
        moments = reference.gradient_moments(mine)
    reference.modulate_(
        mine,
        local.coefficients,
        local.modality,
        noise=noise,
        seed=local.seed,
        step=local.now,
        tensor_ids=local.tensor_ids,
        offsets=local.offsets,
        moments=moments,
        eps=local.eps,
    )
    if given.status is not None and moments is not None:
        broken = (~moments[:, 1].isfinite()).any()
        given.status.bitwise_or_(broken.to(given.status) * NON_FINITE_GRADIENT)
    if given.advance:
        given.counter.add_(1)  # type: ignore[union-attr]


_operation = Operation(
    "modulate_(Tensor(a!)[] grads, Tensor coefficients, int[] modality, Tensor noise, int seed, "
    "int step, Tensor(b!)? counter, int[]? tensor_ids, int[]? offsets, Tensor? moments, float eps, "
    "Tensor(c!)? status, bool advance, Tensor? inverse_scale, Tensor(d!)? found_inf) -> ()",
    device=lambda grads, coefficients, *_: coefficients.device,
    native=_native,
    reference=_reference,
)
