"""Logits and labels as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def rows(tensor: Tensor) -> Tensor:
    """Values by class ``[B, C, ...]`` as contiguous rows ``[N, C]``, one for each label."""
    if tensor.ndim > 2:
        tensor = tensor.movedim(1, -1).flatten(0, -2)
    return tensor.contiguous()


def check_labels(op: str, logits: Sequence[Tensor], target: Tensor, ignore_index: int) -> None:
    """Raise IndexError for a label outside ``[0, C)``; only on the CPU, where reading is free."""
    if target.is_floating_point() or target.device.type != "cpu":
        return
    classes = logits[0].shape[1]
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        where = int(wrong.flatten().nonzero()[0])
        raise IndexError(
            f"{op}: target must be in [0, {classes}) or ignore_index "
            f"(got {int(target.flatten()[where])} at {where})"
        )
