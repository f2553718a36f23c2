"""The conditional learning speed of a step against a loop over parameters that reads each norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmbal_fast.methods import ConditionalLearningSpeed

SIZES = {"small": 64, "resnet18-pair": 157_000}  # elements of each of 142 tensors


def parameters_of(elements):
    parameters = [nn.Parameter(torch.randn(elements)) for _ in range(142)]
    for parameter in parameters:
        parameter.grad = torch.randn(elements)
    return parameters


def loop(groups):
    """As the released code measures: a host read for every weight and every gradient."""
    for parameters in groups:
        weight = gradient = 0.0
        for parameter in parameters:
            weight += (parameter.detach().norm(2) ** 2).item()
            gradient += (parameter.grad.norm(2) ** 2).item()
        assert gradient / weight > 0


@pytest.mark.parametrize("provider", ["mmbal_fast", "loop"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.benchmark(group="conditional learning speed, 142 tensors")
def test_update(benchmark, size, provider):
    parameters = parameters_of(SIZES[size])
    groups = [parameters[:10], parameters[10:20], parameters[20:80], parameters[80:]]
    measure = ConditionalLearningSpeed(
        bypass={"a": groups[0], "b": groups[1]}, main={"a": groups[2], "b": groups[3]}
    )
    run = measure.update if provider == "mmbal_fast" else lambda: loop(groups)
    benchmark.pedantic(run, rounds=30, warmup_rounds=3)
