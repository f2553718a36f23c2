"""The conditional learning speed of a step against a loop over parameters that reads each norm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from mmbal_fast import ConditionalLearningSpeed
from mmbal_fast.nn import MMTM


def resnet18(channels: int) -> Iterator[int]:
    """Elements of each of the 62 parameters."""
    yield from (64 * channels * 49, 64, 64)
    width = 64
    for planes in (64, 128, 256, 512):
        for inputs in (width, planes):
            yield from (planes * inputs * 9, planes, planes, planes * planes * 9, planes, planes)
            if inputs != planes:
                yield from (planes * inputs, planes, planes)
        width = planes
    yield from (512 * 6, 6)


def groups_of(size: str) -> list[list[nn.Parameter]]:
    """Of two ResNet-18 that three MMTMs join, 142 tensors: bypass of each branch, main of each."""
    mmtms = [MMTM([channels, channels]) for channels in (128, 256, 512)]
    bypass: list[list[nn.Parameter]] = [
        [each for mmtm in mmtms for each in mmtm.bypass_parameters(branch)] for branch in (0, 1)
    ]
    main = [[nn.Parameter(torch.randn(n)) for n in resnet18(channels)] for channels in (1, 3)]
    groups = [*bypass, *main]
    if size != "resnet18-pair":  # as many tensors, all of one size
        small = {
            id(each): nn.Parameter(torch.randn(int(size))) for group in groups for each in group
        }
        groups = [[small[id(each)] for each in group] for group in groups]
    parameters = {id(each): each for group in groups for each in group}
    assert len(parameters) == 142
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    return groups


def loop(groups: list[list[nn.Parameter]]) -> None:
    """As the released code measures: a host read for every weight and every gradient."""
    norms: dict[int, tuple[float, float]] = {}
    for group in groups:
        for parameter in group:
            if id(parameter) not in norms:
                weight = (parameter.detach().norm(2) ** 2).item()
                norms[id(parameter)] = weight, (parameter.grad.norm(2) ** 2).item()
        weight, gradient = map(sum, zip(*(norms[id(each)] for each in group), strict=True))
        assert gradient / weight > 0


@pytest.mark.parametrize("provider", ["mmbal_fast", "loop"])
@pytest.mark.parametrize("size", ["64", "1024", "4096", "resnet18-pair"])
@pytest.mark.benchmark(group="conditional learning speed, 142 tensors")
def test_update(benchmark, size, provider):
    groups = groups_of(size)
    measure = ConditionalLearningSpeed(
        bypass={"a": groups[0], "b": groups[1]}, main={"a": groups[2], "b": groups[3]}
    )
    run = measure.update if provider == "mmbal_fast" else lambda: loop(groups)
    benchmark.pedantic(run, rounds=30, warmup_rounds=3)
