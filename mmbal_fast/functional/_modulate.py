"""The in-place update of OGM-GE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmbal_fast import _backend, reference
from mmbal_fast.functional import _checks
from mmbal_fast.functional._moments import gradient_moments_eager

EPS = 1e-8
"""Added to the standard deviation, as in the released code of OGM-GE."""

NON_FINITE_GRADIENT = 1
LABEL_OUT_OF_RANGE = 2
"""Bits of the status word, as in csrc/math/modulation.h."""


@dataclass(frozen=True)
class Update:
    """The arguments of `modulate_` beside the gradients, checked."""

    coefficients: Tensor
    modality: Sequence[int]
    noise: float = 1.0
    seed: int = 0
    step: int | Tensor = 0
    tensor_ids: Sequence[int] | None = None
    offsets: Sequence[int] | None = None
    moments: Tensor | None = None
    eps: float = EPS
    status: Tensor | None = None
    advance: bool = False
    """Add 1 to the tensor ``step`` at the end."""
    names: Sequence[str] | None = None
    """What errors call the gradients."""
    inverse_scale: Tensor | None = None
    """float32 ``[]``: multiply the gradients by it first, rounded to their type, see `unscales`."""
    found_inf: Tensor | None = None
    """float32 ``[]``: set to 1 if a gradient is not finite before ``inverse_scale``."""

    def only(self, kept: Sequence[int], total: int) -> Update:
        """The arguments for the gradients at the positions ``kept`` of ``total``."""
        ids = range(total) if self.tensor_ids is None else self.tensor_ids
        return replace(
            self,
            modality=[self.modality[index] for index in kept],
            tensor_ids=[ids[index] for index in kept],
            offsets=None if self.offsets is None else [self.offsets[index] for index in kept],
            moments=None if self.moments is None else self.moments[list(kept)],
            names=None if self.names is None else [self.names[index] for index in kept],
        )


def modulate_(
    grads: Sequence[Tensor | None],
    coefficients: Tensor,
    modality: Sequence[int],
    *,
    noise: float = 1.0,
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
        noise: factor of the noise, default 1 as in OGM-GE; 0 gives exactly ``k_m g``.
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
    noise = _checks.number(op, "noise", noise)
    eps = _checks.number(op, "eps", eps)
    seed = _checks.word64(op, "seed", seed)
    if error_if_nonfinite:
        moments = finite_moments(op, grads, moments)
    apply_(
        grads,
        Update(
            coefficients, modality, noise, seed, step, tensor_ids, offsets, moments, eps, status
        ),
    )


def finite_moments(
    op: str,
    grads: Sequence[Tensor | None],
    moments: Tensor | None,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Moments of the gradients, read by the host to raise if they are not finite."""
    moments = gradient_moments_eager(grads, names) if moments is None else moments
    broken = (~moments.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        which = ", ".join(_checks.label(names, index) for index in broken)
        raise RuntimeError(f"{op}: gradients must be finite (got NaN or inf in {which})")
    return moments


def apply_(grads: Sequence[Tensor | None], update: Update) -> None:
    """`modulate_` on checked numbers, eagerly or as one operation of a graph being compiled."""
    if torch.compiler.is_compiling():
        _traced_(grads, update)
    else:
        eager_(grads, update)


def unscales(device: torch.device) -> bool:
    """Whether `apply_` takes ``inverse_scale`` and ``found_inf``: not in a compiled graph."""
    return _backend.runs(device) is not None and not torch.compiler.is_compiling()


def _traced_(grads: Sequence[Tensor | None], update: Update) -> None:
    kept = [index for index, grad in enumerate(grads) if grad is not None]
    update = update.only(kept, len(grads))
    counter = update.step if isinstance(update.step, Tensor) else None
    torch.ops.mmbal.modulate_(
        [grads[index] for index in kept],
        update.coefficients,
        list(update.modality),
        noise=update.noise,
        seed=update.seed - 2**64 if update.seed >= 2**63 else update.seed,
        step=0 if isinstance(update.step, Tensor) else update.step,
        counter=counter,
        tensor_ids=update.tensor_ids,
        offsets=update.offsets,
        moments=update.moments,
        eps=update.eps,
        status=update.status,
        advance=update.advance,
    )


@torch.no_grad()
def eager_(grads: Sequence[Tensor | None], update: Update) -> None:
    """Runs the native kernels or, where there are none, the reference."""
    native = _backend.runs(update.coefficients.device)
    if native is None:
        _reference_(grads, update)
        return
    unfit = native.modulate_(
        grads,
        update.coefficients,
        update.modality,
        update.noise,
        update.seed,
        update.step,
        update.tensor_ids,
        update.offsets,
        update.moments,
        update.eps,
        update.status,
        update.advance,
        update.names,
        torch.get_num_threads(),
        _backend.workspace,
        update.inverse_scale,
        update.found_inf,
        _backend.single_launch,
    )
    if unfit is True:
        _per_device_(grads, update)
    elif unfit is not None:
        # Tensors with gaps between their elements are updated in a packed copy.
        packed = list(grads)
        copies: dict[object, Tensor] = {}  # one for a tensor that is listed twice
        for index in unfit:
            view = grads[index]
            which = (view.data_ptr(), view.shape, view.stride())
            packed[index] = copies.setdefault(which, view.contiguous())
        eager_(packed, update)
        for index in unfit:
            grads[index].copy_(packed[index])


def _per_device_(grads: Sequence[Tensor | None], update: Update) -> None:
    groups: dict[torch.device, list[int]] = {}
    for index, grad in enumerate(grads):
        if grad is not None and grad.numel() > 0:
            groups.setdefault(grad.device, []).append(index)
    home = update.coefficients.device
    if any(device.type != home.type for device in groups):
        raise ValueError(
            "modulate_: gradients must be on the kind of device that the coefficients are on "
            f"(got {', '.join(map(str, groups))} and {home})"
        )

    def at(value: Tensor | None, device: torch.device) -> Tensor | None:
        return None if value is None else value.to(device, non_blocking=True)

    # All groups are checked before the first is written.
    _checks.gradients("modulate_", grads, update.names)
    for device, kept in groups.items():
        local = update.only(kept, len(grads))
        status = at(update.status, device)
        step = update.step.to(device) if isinstance(update.step, Tensor) else update.step
        eager_(
            [grads[index] for index in kept],
            replace(
                local,
                coefficients=update.coefficients.to(device, non_blocking=True),
                step=step,
                moments=at(local.moments, device),
                status=status,
                advance=False,
            ),
        )
        if update.status is not None and status is not update.status:
            update.status.bitwise_or_(status.to(home))  # type: ignore[union-attr]
    if update.advance:
        update.step.add_(1)  # type: ignore[union-attr]


def _reference_(grads: Sequence[Tensor | None], update: Update) -> None:
    op = "modulate_"
    total = len(grads)
    for name, values in (
        ("modality", update.modality),
        ("tensor_ids", update.tensor_ids),
        ("offsets", update.offsets),
        ("moments", update.moments),
    ):
        if values is not None and len(values) != total:
            raise ValueError(
                f"{op}: {name} must hold one entry per gradient (got {len(values)} for {total})"
            )
    _checks.gradients(op, grads, update.names)
    kept: list[int] = []
    owner: dict[int, int] = {}
    for index, grad in enumerate(grads):
        if grad is None or grad.numel() == 0:
            continue
        modality = update.modality[index]
        if not 0 <= modality < len(update.coefficients):
            raise ValueError(
                f"{op}: {_checks.label(update.names, index)} must belong to a modality from 0 to "
                f"{len(update.coefficients) - 1} (got {modality})"
            )
        if grad.device.type != update.coefficients.device.type:
            raise ValueError(
                f"{op}: coefficients must be on the device of the gradients "
                f"(got {update.coefficients.device} and {grad.device})"
            )
        first = owner.setdefault(grad.data_ptr(), index)
        if first == index:
            kept.append(index)
        elif update.modality[first] != modality or grads[first].numel() != grad.numel():  # type: ignore[union-attr]
            raise ValueError(
                f"{op}: {_checks.label(update.names, index)} must belong to one modality and not "
                f"share memory with another (got modalities {update.modality[first]} and "
                f"{modality})"
            )
    local = update.only(kept, total)
    mine = [grads[index] for index in kept]
    moments = local.moments
    if moments is None and (local.noise != 0 or update.status is not None):
        moments = reference.gradient_moments(mine)
    reference.modulate_(
        mine,
        local.coefficients,
        local.modality,
        noise=local.noise,
        seed=local.seed,
        step=local.step,
        tensor_ids=local.tensor_ids,
        offsets=local.offsets,
        moments=moments,
        eps=local.eps,
    )
    if update.status is not None and moments is not None:
        broken = (~moments.isfinite()).any()
        update.status.bitwise_or_(broken.to(update.status) * NON_FINITE_GRADIENT)
    if update.advance:
        update.step.add_(1)  # type: ignore[union-attr]
