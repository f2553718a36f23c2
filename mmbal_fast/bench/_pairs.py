"""What methods do that walk several lists of gradients together: MMPareto and InfoReg."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmbal_fast import functional
from mmbal_fast.bench._baselines import published_pareto_, published_pull_
from mmbal_fast.bench._measure import Provider
from mmbal_fast.bench._workloads import Gradients

OURS, PUBLISHED, PLAIN, FLOOR = "mmbal_fast", "published", "plain", "floor"


def dots(workload: Gradients, dtype: torch.dtype, device: torch.device) -> list[Provider]:
    """The dot products of two lists; the floor is `torch.sum` of both."""
    first, second = (workload.make(dtype, device, seed) for seed in (0, 1))

    def plain() -> None:
        for x, y in zip(first, second, strict=True):
            x, y = x.view(-1), y.view(-1)
            torch.stack([x.dot(x), x.dot(y), y.dot(y)])

    return [
        Provider(OURS, lambda: functional.gradient_dots(first, second)),
        Provider(PLAIN, plain),
        Provider(FLOOR, lambda: [each.sum() for each in (*first, *second)]),
    ]


def mmpareto(workload: Gradients, dtype: torch.dtype, device: torch.device) -> list[Provider]:
    """What MMPareto does after the backward passes, where both encoders' gradients conflict.

    The floor is `torch.sum` of both lists, and a copy of as many bytes as the second pass moves.
    """
    own = workload.make(dtype, device, 1)
    fused = [x - 0.5 * y for x, y in zip(workload.make(dtype, device, 0), own, strict=True)]
    pristine = [x + y for x, y in zip(fused, own, strict=True)]
    total = [torch.empty_like(each) for each in own]
    modality = workload.modality
    count = len(workload.shapes[0])
    encoders = slice(None, count), slice(count, None)

    def published() -> None:
        for each in encoders:
            published_pareto_(total[each], fused[each], own[each])

    scratch = [torch.empty_like(each) for each in own]

    def floor() -> None:
        for each in (*total, *own):
            each.sum()
        torch._foreach_copy_(scratch, own)
        for each in own:
            each.sum()

    def restore() -> None:
        torch._foreach_copy_(total, pristine)

    return [
        Provider(OURS, lambda: functional.pareto_(total, own, modality, 2), restore),
        Provider(PUBLISHED, published, restore),
        Provider(FLOOR, floor, restore),
    ]


def info_reg(workload: Gradients, dtype: torch.dtype, device: torch.device) -> list[Provider]:
    """InfoReg's pull of both encoders, with the squares that its traces are made of.

    The floor is a copy of as many bytes: three reads and a write of a list are two copies of it.
    """
    pristine, weights, anchors = (workload.make(dtype, device, seed) for seed in range(3))
    grads = [torch.empty_like(each) for each in pristine]
    beta = torch.tensor([0.95, 0.1], device=device)
    modality = workload.modality
    factors = [(0.95, 0.1)[owner] for owner in modality]

    def plain() -> None:
        moved = torch._foreach_sub(weights, anchors)
        torch._foreach_mul_(moved, factors)
        torch._foreach_add_(grads, moved)
        torch._foreach_norm(grads)

    scratch = [torch.empty_like(each) for each in pristine]

    def floor() -> None:
        torch._foreach_copy_(scratch, weights)
        torch._foreach_copy_(scratch, anchors)

    def restore() -> None:
        torch._foreach_copy_(grads, pristine)

    return [
        Provider(OURS, lambda: functional.pull_(grads, weights, anchors, beta, modality), restore),
        Provider(PUBLISHED, lambda: published_pull_(grads, weights, anchors, factors), restore),
        Provider(PLAIN, plain, restore),
        Provider(FLOOR, floor, restore),
    ]


PARTS: dict[str, tuple[int, Callable[[Gradients, torch.dtype, torch.device], list[Provider]]]] = {
    "dots": (2, dots),
    "mmpareto": (5, mmpareto),
    "info_reg": (4, info_reg),
}
"""By name: how often the bytes of a list must move at least, and the providers."""
