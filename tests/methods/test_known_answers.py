"""Numbers and noise bits that a change of the code's shape must not move.

Written down by the code before `mmbal_fast.training` was cut out of the methods. Where the bits
are a contract (noise, moments, the update) they are compared by hash, elsewhere to a few ulp.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mmbal_fast
from mmbal_fast.nn import MMTM

if TYPE_CHECKING:
    from tests.conftest import Backend

NAMES = ("audio", "image", "text")


def digest(tensors: Sequence[Tensor]) -> str:
    found = hashlib.sha256()
    for each in tensors:
        found.update(each.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def numbers(*shape: int, start: int = 1) -> Tensor:
    """Whole numbers over 64, from no generator."""
    count = torch.Size(shape).numel()
    values = torch.arange(start, start + count, dtype=torch.int64) * 2654435761 % 257
    return (values.float() / 64 - 2).reshape(shape)


def modulated(backend: Backend, **options: Any) -> tuple[list[Tensor], Any]:
    shapes = (33, 70), (5,), (8, 3, 3, 3)
    encoders = {
        name: [nn.Parameter(torch.zeros(shape).to(backend.device)) for shape in shapes]
        for name in NAMES
    }
    grads = []
    for start, parameter in enumerate(each for group in encoders.values() for each in group):
        parameter.grad = numbers(*parameter.shape, start=1 + 7919 * start).to(backend.device)
        grads.append(parameter.grad)
    balancer = mmbal_fast.OGMGE(encoders, alpha=0.5, seed=11, **options)
    for step in range(3):
        logits = {
            name: numbers(9, 4, start=100 * step + i).to(backend.device)
            for i, name in enumerate(NAMES)
        }
        record = balancer.step(logits, (torch.arange(9) % 4).to(backend.device))
    return grads, record


def half(ratios: Tensor) -> Tensor:
    return torch.full_like(ratios, 0.5)


CHUNKED = "d8bd8a50738ecd76"
"""CUDA kernels merge moments in another order: the deviation differs in the last bit."""


@pytest.mark.parametrize("noise", [1.0, 0.0])
def test_bits_of_modulated_gradients(native: Backend, noise: float) -> None:
    expected = "238df92998c53623"
    if noise:
        expected = CHUNKED if native.cuda_kernels else "316c7927b51637cb"
    assert digest(modulated(native, rule=half, noise=noise)[0]) == expected


def test_scores_ratios_and_coefficients(backend: Backend) -> None:
    encoders = {name: [nn.Parameter(torch.zeros(2, 2).to(backend.device))] for name in NAMES}
    for (parameter,) in encoders.values():
        parameter.grad = torch.ones_like(parameter)
    logits = {
        name: numbers(9, 4, start=start).to(backend.device) for start, name in enumerate(NAMES)
    }
    record = mmbal_fast.OGMGE(encoders, alpha=0.5).step(
        logits, (torch.arange(9) % 4).to(backend.device)
    )
    for found, expected in (
        (record.scores, [0.3888038098812103, 3.5697569847106934, 4.639806747436523]),
        (record.ratios, [0.09635673463344574, 4.975379943847656, 6.616648197174072]),
        (record.coefficients, [1.0, 0.013717055320739746, 0.002672255039215088]),
    ):
        assert found.tolist() == pytest.approx(expected, rel=2e-6, abs=2e-7)


def test_weights_and_loss_of_gradient_blending(backend: Backend) -> None:
    blending = mmbal_fast.GradientBlending(["audio", "image", "fused"])
    for k in range(2):
        blending.record("train", [1.0 - 0.3 * k, 1.2 - 0.5 * k, 0.9 - 0.6 * k], samples=10)
        blending.record("validation", [1.1 - 0.2 * k, 1.3 - 0.4 * k, 1.0 - 0.3 * k], samples=5)
        blending.update()
    expected = [0.31578947368420995, 0.6315789473684215, 0.052631578947368474]
    assert blending.weights.tolist() == pytest.approx(expected, rel=1e-12)
    logits = {
        name: numbers(6, 5, start=50 * i).to(backend.device).requires_grad_()
        for i, name in enumerate(blending.names)
    }
    loss = blending.loss(logits, (torch.arange(6) % 5).to(backend.device))
    assert loss.item() == pytest.approx(1.8627111911773682, rel=1e-6)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 3)])
        self.b = nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 3)])
        self.mmtm = MMTM([4, 4])
        with torch.no_grad():
            for start, parameter in enumerate(self.parameters()):
                parameter.copy_(numbers(*parameter.shape, start=3 + 101 * start) / 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.mmtm(self.a[0](x), self.b[0](y))
        return self.a[1](x), self.b[1](y)


def test_speeds_and_branches_of_greedy_balancing() -> None:
    net = Joined()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    balancing = mmbal_fast.GreedyBalancing(net, warmup_steps=1, window=2)
    branches = []
    for step in range(6):
        optimizer.zero_grad()
        inputs = numbers(8, 6, start=11 * step), numbers(8, 5, start=13 * step)
        target = torch.arange(8) % 3
        torch.stack([cross_entropy(each, target) for each in net(*inputs)]).sum().backward()
        record = balancing.step()
        optimizer.step()
        branches.append(int(record.branch))
    assert branches == [-1, 0, 0, -1, 0, 0]
    expected = [-1.3995215016463076, -1.573566027475739]
    assert record.speed.tolist() == pytest.approx(expected, rel=1e-6)
