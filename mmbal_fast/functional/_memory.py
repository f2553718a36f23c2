"""Which tensors share memory, and what is packed because it has gaps."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmbal_fast.functional import _checks

Layout = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""Where a tensor is: address, bytes of an element, shape, strides in elements."""


def distinct(
    op: str,
    grads: Sequence[Tensor | None],
    modality: Sequence[int],
    names: Sequence[str] | None,
) -> list[int]:
    """Positions of the gradients that are not empty, and of one that is listed twice the first.

    Lists of dense gradients are checked by the native module; this also sees between the elements
    of those that have gaps.

    Raises:
        ValueError: two gradients share memory, and are not one gradient of one modality.
    """
    places = []
    for index, grad in enumerate(grads):
        if grad is not None and grad.numel() > 0:
            layout = (grad.data_ptr(), grad.itemsize, tuple(grad.shape), grad.stride())
            places.append((layout[0], index, _end(layout), layout))
    kept: list[int] = []
    group: list[tuple[int, Layout]] = []  # those whose ranges of addresses meet
    end = 0
    for address, index, its_end, layout in sorted(places):
        if address >= end:
            kept += _distinct_of_group(op, grads, modality, names, group)
            group = []
        group.append((index, layout))
        end = max(end, its_end)
    kept += _distinct_of_group(op, grads, modality, names, group)
    return sorted(kept)


def _distinct_of_group(
    op: str,
    grads: Sequence[Tensor | None],
    modality: Sequence[int],
    names: Sequence[str] | None,
    group: Sequence[tuple[int, Layout]],
) -> list[int]:
    first: dict[object, tuple[int, Layout]] = {}
    for index, layout in group:
        grad = grads[index]
        assert grad is not None
        # Dense ones in any order of dimensions are the same elements.
        shape = grad.numel() if _is_dense(layout) else layout[2:]
        same = (layout[0], shape, grad.dtype, grad.is_neg(), modality[index])
        first.setdefault(same, (index, layout))
    rest = list(first.values())
    if len(rest) > 1:
        start = rest[0][1][0]
        pair = _shared(tuple((layout[0] - start, *layout[1:]) for _, layout in rest))
        if pair is not None:
            before, after = sorted(rest[which][0] for which in pair)
            sizes = [grads[index].numel() for index in (before, after)]  # type: ignore[union-attr]
            raise ValueError(
                f"{op}: {_checks.label(names, after)} must belong to one modality and not share "
                f"memory with another (got modalities {modality[before]} and {modality[after]}, "
                f"sizes {sizes[0]} and {sizes[1]}, the other grads[{before}])"
            )
    return [index for index, _ in rest]


def require_apart(op: str, names: Sequence[str] | None, **lists: Sequence[Tensor | None]) -> None:
    """That no tensor of the first list shares memory with another one of any list.

    Positions where one of them is None or empty do not count. Lists of dense tensors are checked by
    the native module; this also sees between the elements of those that have gaps. Lists are given
    by what errors call them.

    Raises:
        ValueError: two tensors have an element in common, and one of them is of the first list.
    """
    places = []
    for index, row in enumerate(zip(*lists.values(), strict=True)):
        if any(each is None or each.numel() == 0 for each in row):
            continue
        for which, (name, each) in enumerate(zip(lists, row, strict=True)):
            assert each is not None
            layout = (each.data_ptr(), each.itemsize, tuple(each.shape), each.stride())
            places.append((layout[0], which, index, name, layout))
    open_: list[tuple[int, int, str, Layout]] = []  # those that reach as far as the next address
    for address, which, index, name, layout in sorted(places):
        open_ = [each for each in open_ if _end(each[3]) > address]
        for other, its_index, its_name, its_layout in open_:
            if min(which, other) > 0:
                continue
            start = its_layout[0]
            if _shared(((0, *its_layout[1:]), (address - start, *layout[1:]))) is not None:
                found = sorted([(which, index, name), (other, its_index, its_name)])
                (_, first, what), (_, second, beside) = found
                label = _checks.label(names, first) if names is not None else f"{what}[{first}]"
                raise ValueError(
                    f"{op}: {label} must not share memory with another tensor "
                    f"(got {beside}[{second}] beside it)"
                )
        open_.append((which, index, name, layout))


def packed(unfit: Sequence[int], *lists: Sequence[Tensor | None]) -> list[list[Any]]:
    """The lists with what is contiguous and not negated at the positions ``unfit``."""
    copies: list[list[Any]] = [list(each) for each in lists]
    for index in unfit:
        for each in copies:
            each[index] = each[index].resolve_neg().contiguous()
    return copies


def unpack_(tensors: Sequence[Tensor | None], unfit: Sequence[int], copies: list[Any]) -> None:
    """Writes back what became of a list that was `packed`."""
    for index in unfit:
        if copies[index] is not tensors[index]:
            tensors[index].copy_(copies[index])  # type: ignore[union-attr]


def _end(layout: Layout) -> int:
    """The address behind a tensor's last element."""
    address, itemsize, shape, strides = layout
    steps = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return address + itemsize * (1 + steps)


def _is_dense(layout: Layout) -> bool:
    return _end(layout) - layout[0] == layout[1] * math.prod(layout[2])


# Kept, because a training run asks the same at every step.
@functools.lru_cache(maxsize=64)
def _shared(layouts: tuple[Layout, ...]) -> tuple[int, int] | None:
    """Two tensors that have an element in common, of those whose addresses count from 0."""
    unit = math.gcd(*(part for layout in layouts for part in layout[:2]))
    used = torch.zeros(max(map(_end, layouts)) // unit, dtype=torch.bool, device="cpu")
    for which, layout in enumerate(layouts):
        if bool(_elements(used, layout, unit).any()):
            for other in range(which):
                used.zero_()
                _elements(used, layouts[other], unit).fill_(True)
                if bool(_elements(used, layout, unit).any()):
                    return other, which
        _elements(used, layout, unit).fill_(True)
    return None


def _elements(used: Tensor, layout: Layout, unit: int) -> Tensor:
    """A view of what a tensor uses of memory that is counted in units."""
    address, itemsize, shape, strides = layout
    times = itemsize // unit
    return used.as_strided(
        (*shape, times), (*(stride * times for stride in strides), 1), address // unit
    )
