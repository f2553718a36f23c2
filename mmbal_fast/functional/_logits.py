"""Logits and labels as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.nn import Parameter

from mmbal_fast.functional import _checks
from mmbal_fast.functional._operation import in_graph


def plain(tensor: Tensor) -> Tensor:
    """A tensor of a subclass that only carries more with it as its elements alone."""
    kind = type(tensor)
    if kind is Tensor or kind is Parameter or in_graph():
        return tensor
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor  # its elements are elsewhere: the native module refuses it by name
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def classes_second(
    op: str, logits: Sequence[Tensor], target: Tensor, class_dim: int
) -> tuple[list[Tensor], Tensor]:
    """Logits and soft labels with the classes moved from ``class_dim`` to dimension 1.

    Raises:
        ValueError: the logits have no such dimension.
    """
    class_dim = _checks.word(op, "class_dim", class_dim)
    if class_dim == 1 and isinstance(logits, list | tuple):
        return list(logits), target
    _checks.batch_of_tensors(op, logits, target)

    def moved(each: Tensor) -> Tensor:
        if each.ndim < 2 or not -each.ndim <= class_dim < each.ndim:
            raise ValueError(
                f"{op}: class_dim must be a dimension of the logits "
                f"(got {class_dim} for shape {list(each.shape)})"
            )
        return each.movedim(class_dim, 1)

    soft = target.is_floating_point()
    return [moved(each) for each in logits], moved(target) if soft else target


def rows(tensor: Tensor) -> Tensor:
    """Values by class ``[B, C, ...]`` as contiguous rows ``[N, C]``, one for each label."""
    if tensor.ndim > 2:
        tensor = tensor.movedim(1, -1).flatten(0, -2)
    return tensor.resolve_neg().contiguous()


def check_labels(op: str, logits: Sequence[Tensor], target: Tensor, ignore_index: int) -> None:
    """Raise IndexError for a label outside ``[0, C)``; only on the CPU, where reading is free."""
    if target.is_floating_point() or target.device.type != "cpu":
        return
    if maybe_current_level() is not None:
        return  # a transform of torch.func has no values to read
    classes = logits[0].shape[1]
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        where = int(wrong.flatten().nonzero()[0])
        raise IndexError(
            f"{op}: target must be in [0, {classes}) or ignore_index "
            f"(got {int(target.flatten()[where])} at {where})"
        )
