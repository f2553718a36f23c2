"""What Python and the bindings cost, on gradients of one element: no kernel has work to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmbal_fast import OGMGE


def balancer_of(tensors):
    parameters = [nn.Parameter(torch.ones(1, 1)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.ones(1, 1)
    half = tensors // 2
    return OGMGE({"audio": parameters[:half], "visual": parameters[half:]}, alpha=0.3)


@pytest.mark.parametrize("tensors", [40, 1000])
@pytest.mark.benchmark(group="host cost of a step")
def test_step(benchmark, tensors):
    balancer = balancer_of(tensors)
    logits = {"audio": torch.zeros(1, 2), "visual": torch.zeros(1, 2)}
    target = torch.zeros(1, dtype=torch.int64)
    benchmark(lambda: balancer.step(logits, target))
