"""The loss of Gradient-Blending: cross-entropies of several heads, blended."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmbal_fast import _backend, reference
from mmbal_fast.functional import _checks
from mmbal_fast.functional._logits import check_labels, classes_second, plain, rows
from mmbal_fast.functional._operation import Operation
from mmbal_fast.reference._blending import compute_dtype


def blended_cross_entropy(
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Tensor | Sequence[float],
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of several heads for one target, in one pass.

    ``loss = sum_k w_k L_k``, ``L_k = CE(logits_k, target)``: Wang, Tran, Feiszli, "What Makes
    Training Multi-Modal Classification Networks Hard?" (CVPR 2020), equation 5. Equivalent to::

        per_head = [F.cross_entropy(x.float(), target, ...) for x in logits]
        loss = sum(w * each for w, each in zip(weights, per_head))

    except that a head of weight 0 is left out: neither its loss nor its gradient (which is 0) can
    make the others NaN when it has diverged. Differentiable once by kernels; more often, and in
    ``torch.func.grad`` and its like, as plain PyTorch.

    Args:
        logits: K >= 2 tensors of one shape ``[B, C]`` or ``[B, C, ...]``, C >= 2: float64, float32,
            float16 or bfloat16, on one device.
        target: class indexes, integer, ``[B]`` or ``[B, ...]``; or soft labels, floating point, of
            the shape of the logits.
        weights: ``[K]``, a tensor on the logits' device (not read by the host) or numbers.
            Constants: no gradient flows to them.
        label_smoothing: 0 to 1, default 0, as in ``torch.nn.functional.cross_entropy``.
        ignore_index: samples with this label do not count; default -100, as in
            ``torch.nn.functional.cross_entropy``. Not used for soft labels.
        class_dim: dimension of the classes in logits and soft labels; default 1, as in
            ``torch.nn.functional.cross_entropy``. -1 for token logits ``[B, T, C]``.

    Returns:
        ``loss``, a scalar, and ``per_head_losses`` ``[K]``, detached: the means over the samples
        that count, unweighted, for recording. float64 if any of the logits is, float32 otherwise
        (for float16 and bfloat16 as well; their gradients are rounded once).
        If no sample counts (batch of 0, all labels ignored) both are NaN and the gradients 0, as in
        ``torch.nn.functional.cross_entropy``.

    Raises:
        ValueError: K < 2; C < 2; logits of different shapes or devices; target or weights of
            another length; soft labels that are no distribution, on the CPU (elsewhere they are not
            read); ``label_smoothing`` outside 0 to 1; ``weights`` or soft labels that require grad.
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
    logits, target = classes_second("blended_cross_entropy", logits, target, class_dim)
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
    weights, label_smoothing = _checked(logits, target, weights, label_smoothing)
    ignore_index = _checks.word("blended_cross_entropy", "ignore_index", ignore_index)
    logits, target = [plain(each) for each in logits], plain(target)
    dtype = compute_dtype(logits)
    if dtype == torch.float64:  # the kernels have all logits in float64, or none
        logits = [each.double() for each in logits]
    soft = target.is_floating_point()
    labels = rows(target).to(dtype) if soft else target.reshape(-1).long()
    loss, per_head, _, count = _forward(
        [rows(each) for each in logits], labels, weights, label_smoothing, ignore_index
    )
    return loss, per_head, count


def check_label_smoothing(op: str, label_smoothing: float) -> float:
    """Refuse label smoothing outside 0 to 1."""
    value = _checks.real(op, "label_smoothing", label_smoothing)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be 0 to 1 (got {label_smoothing})")
    return value


def _checked(
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Tensor | Sequence[float],
    label_smoothing: float,
) -> tuple[Tensor, float]:
    """Refuse what does not fit; the weights as float64 on the logits' device, the smoothing."""
    op = "blended_cross_entropy"
    _checks.batch_of_tensors(op, logits, target)
    if len(logits) < 2:
        raise ValueError(f"{op}: there must be at least 2 heads (got {len(logits)})")
    _checks.batch(op, logits, target)
    if target.requires_grad:
        raise ValueError(f"{op}: soft labels are constants, detach them (got requires_grad=True)")
    label_smoothing = check_label_smoothing(op, label_smoothing)
    if isinstance(weights, Tensor) and weights.requires_grad:
        raise ValueError(f"{op}: weights are constants, detach them (got requires_grad=True)")
    weights = _checks.numbers(op, "weights", weights, target.device)
    if weights.shape != (len(logits),):
        raise ValueError(
            f"{op}: weights must be [{len(logits)}], one for each head (got {list(weights.shape)})"
        )
    if weights.device != target.device:
        raise ValueError(
            f"{op}: weights must be on the logits' device {target.device} (got {weights.device})"
        )
    return weights, label_smoothing


def _fake(
    logits: Sequence[Tensor], target: Tensor, weights: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(logits)
    return (
        weights.new_empty((), dtype=dtype),
        weights.new_empty((len(logits),), dtype=dtype),
        weights.new_empty((2, len(logits), target.shape[0]), dtype=dtype),
        weights.new_empty((), dtype=torch.int64),
    )


def _native(
    native: ModuleType,
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, per_head, normalizers, count = results = _fake(logits, target, weights)
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
    return results


def _reference(
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_labels("blended_cross_entropy", logits, target, ignore_index)
    _, _, normalizers, count = _fake(logits, target, weights)
    loss, per_head = reference.blended_cross_entropy(
        logits, target, weights, label_smoothing=label_smoothing, ignore_index=ignore_index
    )
    valid = target != ignore_index
    count = count.fill_(len(target)) if target.is_floating_point() else valid.sum()
    return loss, per_head, normalizers.zero_(), count


def _native_gradients(
    native: ModuleType,
    grad: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Tensor,
    normalizers: Tensor,
    count: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> list[Tensor]:
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


def _reference_gradients(
    grad: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    weights: Tensor,
    normalizers: Tensor,
    count: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> list[Tensor]:
    again = torch.is_grad_enabled()  # the gradients are differentiated in turn
    # One that needs no gradient gets one of its own.
    inputs = [x if again and x.requires_grad else x.detach().requires_grad_() for x in logits]
    with torch.enable_grad():
        loss, _ = reference.blended_cross_entropy(
            inputs, target, weights, label_smoothing=label_smoothing, ignore_index=ignore_index
        )
    return list(torch.autograd.grad(loss, inputs, grad, create_graph=again))


_gradients = Operation(
    "blended_cross_entropy_backward(Tensor grad, Tensor[] logits, Tensor target, Tensor weights, "
    "Tensor normalizers, Tensor count, float label_smoothing, int ignore_index) -> Tensor[]",
    device=lambda grad, *_: grad.device,
    native=_native_gradients,
    reference=_reference_gradients,
    fake=lambda grad, logits, *_: [torch.empty_like(each) for each in logits],
)
"""Gradients of the logits from that of the loss, and what the forward had and returned."""


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weights, ctx.label_smoothing, ctx.ignore_index = inputs
    _, per_head, normalizers, count = output
    ctx.mark_non_differentiable(per_head, normalizers, count)
    ctx.save_for_backward(target, weights, normalizers, count, *logits)


def _saved(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    target, weights, normalizers, count, *logits = ctx.saved_tensors
    return (
        grad, logits, target, weights, normalizers, count, ctx.label_smoothing, ctx.ignore_index,
    )  # fmt: skip


_forward = Operation(
    "blended_cross_entropy(Tensor[] logits, Tensor target, Tensor weights, float label_smoothing, "
    "int ignore_index) -> (Tensor loss, Tensor per_head, Tensor normalizers, Tensor count)",
    device=lambda logits, target, *_: target.device,
    native=_native,
    reference=_reference,
    fake=_fake,
    backward=_gradients,
    save=_save,
    saved=_saved,
)
"""Losses of rows.

Args:
    logits: K of ``[N, C]``, contiguous, all of float64 or none.
    target: int64 ``[N]``, or soft ``[N, C]`` in the type of the losses.
    weights: float64 ``[K]``.
    label_smoothing: as in `blended_cross_entropy`.
    ignore_index: as in `blended_cross_entropy`.

Returns:
    The loss ``[]``, the losses ``[K]``, ``[2, K, N]`` with the maximum of each row and the log of
    its sum of shifted exponentials, and the int64 count ``[]``. Maximum and log stay apart: their
    sum would round away what matters when logits are large.
"""
