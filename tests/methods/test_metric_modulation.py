"""Modulation by metrics: worked values, the published step, and where it is clamped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import mmbal_fast


def balancer_of(count: int, rho: float = 1.3) -> mmbal_fast.MetricModulation:
    encoders = {name: [nn.Parameter(torch.zeros(1))] for name in "abcd"[:count]}
    for (parameter,) in encoders.values():
        parameter.grad = torch.ones(1)
    return mmbal_fast.MetricModulation(encoders, rho=rho)


def coefficients_of(gains: list[float], rho: float = 1.3) -> list[float]:
    balancer = balancer_of(len(gains), rho)
    before = torch.linspace(0.25, 0.75, len(gains))
    balancer.step(metrics=before)
    found: list[float] = balancer.step(metrics=before + torch.tensor(gains)).coefficients.tolist()
    return found


def test_worked_values() -> None:
    assert coefficients_of([0.5, 0.25, 0.25]) == pytest.approx([0.65, 0.975, 0.975], rel=1e-5)


def test_no_gradient_is_reversed_or_blown_up() -> None:
    """The published formula gives -1 and 2, and 1e7."""
    assert coefficients_of([0.25, -0.125], rho=1.0) == [0.0, 1.0]
    assert coefficients_of([0.125, -0.125, 0.0]) == pytest.approx([0.0, 1.3, 1.3])
    assert coefficients_of([0.0, 0.0]) == pytest.approx([1.3, 1.3])


def test_the_first_metrics_are_only_remembered() -> None:
    record = balancer_of(2).step(metrics={"a": 0.9, "b": 0.1})
    assert record.coefficients.tolist() == [1.0, 1.0]


def test_micro_batches_are_averaged() -> None:
    balancer = balancer_of(2)
    for value in (0.2, 0.4):
        balancer.observe(scores={"a": value, "b": 2 * value})
    torch.testing.assert_close(balancer.step().scores, torch.tensor([0.3, 0.6]))


def test_of_logits_the_metric_is_the_accuracy() -> None:
    logits = {"a": torch.eye(4), "b": torch.eye(4).roll(1, 0)}
    logits["b"][0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    target = torch.tensor([0, 1, -100, 3])
    record = balancer_of(2).step(logits, target)
    torch.testing.assert_close(record.scores, torch.tensor([1.0, 1 / 3]))
    soft = nn.functional.one_hot(torch.tensor([0, 1, 2, 3]), 4).float()
    torch.testing.assert_close(balancer_of(2).step(logits, soft).scores, torch.tensor([1.0, 0.25]))


@pytest.mark.parametrize("call", [{"metrics": torch.ones(3)}, {"metrics": {"a": 1.0}}])
def test_bad_metrics(call: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^MetricModulation.observe: scores must be .*\(got"):
        balancer_of(2).step(**call)  # type: ignore[arg-type]


class Regression(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoders = nn.ModuleDict({name: nn.Linear(4, 3) for name in "abc"[:count]})
        self.head = nn.Linear(3 * count, 1)

    def features(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: encoder(x[name]).tanh() for name, encoder in self.encoders.items()}


def batch_of(step: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = {name: torch.randn(9, 4, generator=generator) for name in "abc"}
    return x, x["a"][:, :1] + 0.3 * x["b"][:, :1]


def metrics_of(step: int, count: int) -> list[float]:
    """Gains that do not leave the range where both are the same: none is negative."""
    gains = torch.rand(20, count, generator=torch.Generator().manual_seed(7)) + 0.1
    return gains[: step + 1].sum(0).tolist()


@pytest.mark.parametrize("count", [2, 3])
def test_agrees_with_the_published_step_over_twenty_steps(count: int) -> None:
    theirs, ours = Regression(count), Regression(count)
    rou = 1.3
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05)
    acc1, expected = metrics_of(0, count), [[1.0 / rou] * count]
    for step in range(20):  # the released step, written literally
        x, y = batch_of(step)
        optimizer.zero_grad()
        mse_loss(theirs.head(torch.cat(list(theirs.features(x).values()), 1)), y).backward()
        if step > 0:
            acc2 = metrics_of(step, count)
            diff = [acc2[i] - acc1[i] for i in range(count)]
            diff_sum = sum(diff) + 1e-8
            expected.append([(diff_sum - d) / diff_sum for d in diff])
            acc1 = acc2
        for i in range(count):
            for parameter in list(theirs.encoders.values())[i].parameters():
                parameter.grad *= expected[-1][i] * rou
        optimizer.step()
    balancer = mmbal_fast.MetricModulation(ours.encoders, rho=rou)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    for step in range(20):
        x, y = batch_of(step)
        optimizer.zero_grad()
        mse_loss(ours.head(torch.cat(list(ours.features(x).values()), 1)), y).backward()
        metrics = dict(zip("abc", metrics_of(step, count), strict=False))
        record = balancer.step(metrics=metrics)
        optimizer.step()
        wanted = rou * torch.tensor(expected[step])
        torch.testing.assert_close(record.coefficients, wanted, rtol=1e-4, atol=1e-5)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
