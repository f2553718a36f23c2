"""Gradient-Blending's operations: the OGR, the weights and the blended cross-entropy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmbal_fast import _backend, reference
from mmbal_fast.functional import _checks
from mmbal_fast.reference._blending import FLOOR, compute_dtype, normalized, shares


def overfitting_to_generalization_ratio(
    train_before: Tensor | Sequence[float],
    val_before: Tensor | Sequence[float],
    train_after: Tensor | Sequence[float],
    val_after: Tensor | Sequence[float],
) -> Tensor:
    """How much each head overfitted for what it gained between two checkpoints (OGR).

    With the gap ``O = L^V - L^T``: ``OGR = |dO / dG|``, ``dO = O_after - O_before`` and
    ``dG = L^V_before - L^V_after``. Wang, Tran, Feiszli, "What Makes Training Multi-Modal
    Classification Networks Hard?" (CVPR 2020), section 3.1, equation 2. Lower is better, as long
    as the head gained: the ratio does not show the sign of ``dG``. `blending_weights` does.

    Args:
        train_before: ``[K]``, loss of each head on the training set at the first checkpoint; a mean
            over samples, so that splits of different size compare.
        val_before: the same on samples held out from the training set (never the test set).
        train_after: ``[K]`` on the training set at the second checkpoint.
        val_after: ``[K]`` on the held-out samples at the second checkpoint.

    Returns:
        float64 ``[K]`` on the device of the losses; ``inf`` where ``dG`` is 0, NaN where ``dO`` is
        0 too or a loss is NaN. No host read.

    Raises:
        ValueError: the four differ in shape or device, are not one-dimensional, or K < 2.

    Example:
        >>> from mmbal_fast.functional import overfitting_to_generalization_ratio
        >>> # Two heads: dG = 0.5 for both, the gap grew by 0.1 and by 0.5.
        >>> overfitting_to_generalization_ratio([1.0, 1.0], [1.0, 1.0], [0.4, 0.0], [0.5, 0.5])
        tensor([0.2000, 1.0000], dtype=torch.float64)
    """
    return reference.overfitting_to_generalization_ratio(
        *_checked_losses(
            "overfitting_to_generalization_ratio", train_before, val_before, train_after, val_after
        )
    )


def blending_weights(
    train_before: Tensor | Sequence[float],
    val_before: Tensor | Sequence[float],
    train_after: Tensor | Sequence[float],
    val_after: Tensor | Sequence[float],
    *,
    floor: float = FLOOR,
) -> Tensor:
    """Weights of the heads' losses from what each head gained and overfitted.

    ``w_k = (1 / Z) dG_k / dO_k^2``, ``sum w_k = 1``: Wang, Tran, Feiszli, "What Makes Training
    Multi-Modal Classification Networks Hard?" (CVPR 2020), section 3.2, proposition 1, with ``dO``
    and ``dG`` as in `overfitting_to_generalization_ratio`. Beyond the paper:

    - a head that got worse or stood still (``dG <= 0``), or with a NaN or infinite loss, gets 0;
    - ``|dO|`` counts as at least ``floor`` times the largest ``dG``, so that a head whose gap
      happened not to move does not take all the weight. The floor is relative: multiplying all
      losses by a constant leaves the weights as they are;
    - if that leaves no head, all get ``1 / K``, with a warning if the losses are on the CPU.
      On other devices it is silent, because knowing would take a host read.

    Args:
        train_before: ``[K]``, loss of each head on the training set at the first checkpoint; a mean
            over samples.
        val_before: the same on samples held out from the training set (never the test set).
        train_after: ``[K]`` on the training set at the second checkpoint.
        val_after: ``[K]`` on the held-out samples at the second checkpoint.
        floor: positive; default 0.1. The paper has none. At 0.1 a head with ``dO = 0`` counts at
            most 100 times as much as one whose gap grew as much as its loss fell.

    Returns:
        float64 ``[K]`` on the device of the losses. No host read, except on the CPU.

    Raises:
        ValueError: the four differ in shape or device, are not one-dimensional, K < 2, or ``floor``
            is not a positive number.

    Example:
        >>> from mmbal_fast.functional import blending_weights
        >>> # dG = 0.5, 0.5, -0.2 and dO = 0.1, 0.2, 0.8: dG / dO^2 = 50, 12.5, and none.
        >>> before = [1.0, 1.0, 1.0]
        >>> blending_weights(before, before, [0.4, 0.3, 0.4], [0.5, 0.5, 1.2])
        tensor([0.8000, 0.2000, 0.0000], dtype=torch.float64)
    """
    check_floor("blending_weights", floor)
    losses = _checked_losses("blending_weights", train_before, val_before, train_after, val_after)
    raw = shares(*losses, floor=floor)
    # Reading it costs nothing on the CPU, and is a synchronisation elsewhere.
    if raw.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(raw.any()):
        warnings.warn(
            "blending_weights: no head gained, so all get the same weight (got validation losses "
            f"{losses[1].tolist()} before, {losses[3].tolist()} after)",
            RuntimeWarning,
            stacklevel=2,
        )
    return normalized(raw)


def check_floor(op: str, floor: float) -> None:
    """Refuse a floor that is not a positive number."""
    if not (floor > 0 and math.isfinite(floor)):
        raise ValueError(f"{op}: floor must be a positive number (got {floor})")


def check_label_smoothing(op: str, label_smoothing: float) -> None:
    """Refuse label smoothing outside 0 to 1."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be 0 to 1 (got {label_smoothing})")


def _checked_losses(
    op: str, *losses: Tensor | Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth = (torch.as_tensor(each, dtype=torch.float64) for each in losses)
    tensors = first, second, third, fourth
    if first.ndim != 1 or any(each.shape != first.shape for each in tensors):
        raise ValueError(
            f"{op}: the losses must have one shape [K] (got {[tuple(x.shape) for x in tensors]})"
        )
    if len(first) < 2:
        raise ValueError(f"{op}: there must be at least 2 heads (got {len(first)})")
    if any(each.device != first.device for each in tensors):
        raise ValueError(
            f"{op}: the losses must be on one device (got {[str(x.device) for x in tensors]})"
        )
    return tensors


def blended_cross_entropy(
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Tensor | Sequence[float],
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of several heads for one target, in one pass.

    ``loss = sum_k w_k L_k``, ``L_k = CE(logits_k, target)``: Wang, Tran, Feiszli, "What Makes
    Training Multi-Modal Classification Networks Hard?" (CVPR 2020), equation 5. Equivalent to::

        per_head = [F.cross_entropy(x.float(), target, ...) for x in logits]
        loss = sum(w * each for w, each in zip(weights, per_head))

    except that a head of weight 0 is left out: neither its loss nor its gradient (which is 0) can
    make the others NaN when it has diverged.

    Args:
        logits: K >= 2 tensors of one shape ``[B, C]`` or ``[B, C, ...]``: float64, float32, float16
            or bfloat16, on one device.
        target: class indexes, integer, ``[B]`` or ``[B, ...]``; or soft labels, floating point, of
            the shape of the logits.
        weights: ``[K]``, a tensor on the logits' device (not read by the host) or numbers.
            Constants: no gradient flows to them.
        label_smoothing: 0 to 1, default 0, as in ``torch.nn.functional.cross_entropy``.
        ignore_index: samples with this label do not count; default -100, as in
            ``torch.nn.functional.cross_entropy``. Not used for soft labels.

    Returns:
        ``loss``, a scalar, and ``per_head_losses`` ``[K]``, detached: the means over the samples
        that count, unweighted, for recording. float64 if any of the logits is, float32 otherwise
        (for float16 and bfloat16 as well; their gradients are rounded once).
        If no sample counts (batch of 0, all labels ignored) both are NaN and the gradients 0, as in
        ``torch.nn.functional.cross_entropy``.

    Raises:
        ValueError: K < 2; logits of different shapes or devices; target or weights of another
            length; ``label_smoothing`` outside 0 to 1; ``weights`` or soft labels that require
            grad.
        TypeError: logits that are not floating point; a target that is neither integer nor floating
            point.
        IndexError: a label outside ``[0, C)`` other than ``ignore_index``, on the CPU. On other
            devices such a label makes the losses NaN instead.

    Example:
        >>> import torch
        >>> from mmbal_fast.functional import blended_cross_entropy
        >>> audio = torch.tensor([[2.0, 0.0]], requires_grad=True)
        >>> fused = torch.tensor([[0.0, 0.0]], requires_grad=True)
        >>> loss, per_head = blended_cross_entropy([audio, fused], torch.tensor([0]), [0.25, 0.75])
        >>> per_head
        tensor([0.1269, 0.6931])
        >>> loss.backward()
        >>> audio.grad, fused.grad  # w * (softmax - one-hot)
        (tensor([[-0.0298,  0.0298]]), tensor([[-0.3750,  0.3750]]))
    """
    loss, per_head, _ = blend(
        logits, target, weights, label_smoothing=label_smoothing, ignore_index=ignore_index
    )
    return loss, per_head


def blend(
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Tensor | Sequence[float],
    *,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`blended_cross_entropy` and the number of samples that counted, int64 ``[]``."""
    weights = _checked(logits, target, weights, label_smoothing)
    soft = target.is_floating_point()
    if _native(logits, target) is None:
        loss, per_head = reference.blended_cross_entropy(
            logits, target, weights, label_smoothing=label_smoothing, ignore_index=ignore_index
        )
        samples = target.numel() // (target.shape[1] if soft else 1)
        every = weights.new_full((), samples, dtype=torch.int64)
        return loss, per_head, every if soft else (target != ignore_index).sum()
    rows = [_rows(each) for each in logits]
    labels = _rows(target).to(compute_dtype(logits)) if soft else target.reshape(-1).long()
    if torch.compiler.is_compiling():
        output = _forward_op(rows, labels, weights, label_smoothing, ignore_index)
    else:
        output = _Blend.apply(  # type: ignore[no-untyped-call]
            labels, weights, label_smoothing, ignore_index, *rows
        )
    loss, per_head, _, count = output
    return loss, per_head, count


def _rows(each: Tensor) -> Tensor:
    return (each if each.ndim == 2 else each.movedim(1, -1).reshape(-1, each.shape[1])).contiguous()


def _checked(
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Tensor | Sequence[float],
    label_smoothing: float,
) -> Tensor:
    """Refuse what does not fit; the weights as float64 on the logits' device."""
    op = "blended_cross_entropy"
    if len(logits) < 2:
        raise ValueError(f"{op}: there must be at least 2 heads (got {len(logits)})")
    _checks.batch(op, logits, target)
    if target.requires_grad:
        raise ValueError(f"{op}: soft labels are constants, detach them (got requires_grad=True)")
    check_label_smoothing(op, label_smoothing)
    if not isinstance(weights, Tensor):
        weights = torch.tensor(weights, dtype=torch.float64, device=target.device)
    if weights.shape != (len(logits),):
        raise ValueError(
            f"{op}: weights must be [{len(logits)}], one for each head (got {list(weights.shape)})"
        )
    if weights.device != target.device:
        raise ValueError(
            f"{op}: weights must be on the logits' device {target.device} (got {weights.device})"
        )
    if weights.requires_grad:
        raise ValueError(f"{op}: weights are constants, detach them (got requires_grad=True)")
    return weights.double()


def _native(logits: Sequence[Tensor], target: Tensor) -> ModuleType | None:
    """The native module if it has kernels for these logits; float64 beside others has none."""
    wide = sum(each.dtype == torch.float64 for each in logits)
    return _backend.runs(target.device) if wide in (0, len(logits)) else None


def _forward(
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of rows, by the native module.

    Args:
        logits: K of ``[N, C]``, contiguous.
        target: int64 ``[N]``, or soft ``[N, C]`` in the type of the losses.
        weights: float64 ``[K]``.
        label_smoothing: as in `blended_cross_entropy`.
        ignore_index: as in `blended_cross_entropy`.

    Returns:
        The loss ``[]``, the losses ``[K]``, ``[2, K, N]`` with the maximum of each row and the log
        of its sum of shifted exponentials, and the int64 count ``[]``. Maximum and log stay apart:
        their sum would round away what matters when logits are large.

    Raises:
        RuntimeError: there are no kernels for these logits here.
    """
    native = _native(logits, target)
    if native is None:
        raise RuntimeError(
            "mmbal::blended_cross_entropy: the native module must run it, "
            f"mmbal_fast.functional does without (got {_backend.why_not or target.device})"
        )
    dtype = compute_dtype(logits)
    loss = weights.new_empty((), dtype=dtype)
    per_head = weights.new_empty(len(logits), dtype=dtype)
    normalizers = weights.new_empty((2, len(logits), len(target)), dtype=dtype)
    count = weights.new_empty((), dtype=torch.int64)
    native.cross_entropy(
        logits,
        target,
        weights,
        label_smoothing,
        ignore_index,
        loss,
        per_head,
        normalizers,
        count,
        torch.get_num_threads(),
        _backend.workspace,
    )
    return loss, per_head, normalizers, count


def _backward(
    grad: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Tensor,
    normalizers: Tensor,
    count: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> list[Tensor]:
    """Gradients of the logits, given that of the loss and what the forward returned."""
    native = _native(logits, target)
    assert native is not None  # it ran the forward
    grads = [torch.empty_like(each) for each in logits]
    native.cross_entropy_backward(
        grad.contiguous(),
        logits,
        target,
        weights,
        label_smoothing,
        ignore_index,
        normalizers,
        count,
        grads,
        torch.get_num_threads(),
    )
    return grads


_forward_op = torch.library.custom_op(
    "mmbal::blended_cross_entropy",
    _forward,
    mutates_args=(),
    schema="(Tensor[] logits, Tensor target, Tensor weights, float label_smoothing, "
    "int ignore_index) -> (Tensor loss, Tensor per_head, Tensor normalizers, Tensor count)",
)
_backward_op = torch.library.custom_op(
    "mmbal::blended_cross_entropy_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor[] logits, Tensor target, Tensor weights, Tensor normalizers, "
    "Tensor count, float label_smoothing, int ignore_index) -> Tensor[]",
)


@_forward_op.register_fake
def _(
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(logits)
    return (
        weights.new_empty((), dtype=dtype),
        weights.new_empty((len(logits),), dtype=dtype),
        weights.new_empty((2, len(logits), target.shape[0]), dtype=dtype),
        weights.new_empty((), dtype=torch.int64),
    )


@_backward_op.register_fake
def _(grad: Tensor, logits: Sequence[Tensor], *_: object) -> list[Tensor]:
    return [torch.empty_like(each) for each in logits]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weights, ctx.label_smoothing, ctx.ignore_index = inputs
    _, per_head, normalizers, count = output
    ctx.mark_non_differentiable(per_head, normalizers, count)
    ctx.save_for_backward(target, weights, normalizers, count, *logits)


def _saved(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    target, weights, normalizers, count, *logits = ctx.saved_tensors
    return (
        grad, logits, target, weights, normalizers, count, ctx.label_smoothing, ctx.ignore_index,
    )  # fmt: skip


def _op_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    return _backward_op(*_saved(ctx, grad)), None, None, None, None


_forward_op.register_autograd(_op_backward, setup_context=_save)


class _Blend(torch.autograd.Function):
    """The operation without the dispatcher, which takes longer than a small batch does."""

    @staticmethod
    def forward(
        ctx: Any, target: Tensor, weights: Tensor, smoothing: float, ignore: int, *logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = _forward(logits, target, weights, smoothing, ignore)
        _save(ctx, (logits, target, weights, smoothing, ignore), output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *_backward(*_saved(ctx, grad))
