"""Re-learning against worked values and the published lerp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mmbal_fast
from mmbal_fast import purity


def encoders() -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {name: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for name in "abc"}
    )


def trained(net: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        torch.stack(
            [each(torch.randn(8, 3)).square().sum() for each in net.values()]
        ).sum().backward()
        optimizer.step()
    return optimizer


def test_worked_values_and_the_published_lerp() -> None:
    net = encoders()
    first = {name: each.detach().clone() for name, each in net.state_dict().items()}
    relearning = mmbal_fast.Relearning(net)
    optimizer = trained(net)
    before = {name: each.detach().clone() for name, each in net.state_dict().items()}
    momentum = {p: optimizer.state[p]["momentum_buffer"].clone() for p in net.parameters()}
    record = relearning.step({"a": 0.1, "b": -0.3, "c": 0.0}, optimizer=optimizer)
    assert record.weights.tolist() == pytest.approx([0.291313, 0.716298, 0.0], abs=1e-6)
    weights = dict(zip("abc", record.weights.tolist(), strict=True))
    for name, now in net.state_dict().items():
        w = weights[name[0]]
        if w == 0 or not now.is_floating_point():
            assert torch.equal(now, before[name])  # the very bits
        else:
            torch.testing.assert_close(now, w * first[name] + (1 - w) * before[name])
    for name, parameter in net.named_parameters():
        scaled = momentum[parameter] * (1 - weights[name[0]])
        torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], scaled)


def test_running_statistics_are_pulled_back_too() -> None:
    net = encoders()
    relearning = mmbal_fast.Relearning(net)
    trained(net)
    assert not torch.equal(net["a"][1].running_mean, torch.zeros(4))
    relearning.step({"a": 1e9, "b": 0.0, "c": 0.0})
    assert torch.equal(net["a"][1].running_mean, torch.zeros(4))
    assert int(net["a"][1].num_batches_tracked) == 3


def test_a_model_that_was_made_without_weights() -> None:
    with torch.device("meta"):
        net = encoders()
        relearning = mmbal_fast.Relearning(net)
    with pytest.raises(RuntimeError, match=r"remember: weights must be real \(got meta for 'a.0"):
        relearning.remember()
    gaps = dict.fromkeys("abc", 0.1)
    with pytest.raises(RuntimeError, match=r"needs remember\(\) first"):
        relearning.step(gaps)
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    relearning.remember()
    relearning.step(gaps)


def test_purity() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200,), generator=generator)
    told = torch.randn(200, 3, generator=generator) * 0.01
    told[:, 0] += labels
    assert purity(told, labels * 10 - 3) == 1.0
    kept = labels.clone()
    noise = torch.randn(200, 3, generator=generator)
    assert purity(noise, labels) < 0.5
    assert torch.equal(labels, kept)  # the released code rewrites them
    for wrong in (torch.randn(3), torch.full((200, 2), torch.nan), torch.randn(2, 2)):
        with pytest.raises(ValueError, match=r"^purity: .*\(got"):
            purity(
                wrong, labels[: len(wrong)] if len(wrong) != 2 else torch.tensor([0, 1]), clusters=3
            )


def test_bad_input() -> None:
    relearning = mmbal_fast.Relearning(encoders())
    for gaps in ({"a": 0.1}, dict.fromkeys("abc", float("nan"))):
        with pytest.raises(ValueError, match=r"^Relearning.step: gaps must be"):
            relearning.step(gaps)
    with pytest.raises(ValueError, match=r"must have parameters \(got none for 'b'\)"):
        mmbal_fast.Relearning({"a": nn.Linear(1, 1), "b": nn.ReLU()})
    with pytest.raises(TypeError, match=r"must be modules \(got int for 'b'\)"):
        mmbal_fast.Relearning({"a": nn.Linear(1, 1), "b": 3})  # type: ignore[dict-item]
