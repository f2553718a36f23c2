"""MLB: worked values and the published step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mmbal_fast
from mmbal_fast.nn import MultiHeadLateFusion


def coefficients_of(scores: list[float], **options: float) -> list[float]:
    encoders = {name: [nn.Parameter(torch.zeros(1))] for name in "abcd"[: len(scores)]}
    for (parameter,) in encoders.values():
        parameter.grad = torch.ones(1)
    balancer = mmbal_fast.MLB(encoders, **options)  # type: ignore[arg-type]
    balancer.observe(scores=torch.tensor(scores))
    found = balancer.step().coefficients.tolist()
    assert [each.grad.item() for (each,) in encoders.values()] == found  # type: ignore[union-attr]
    return found


def test_worked_values() -> None:
    found = coefficients_of([2.0, 1.0], alpha=1.0)
    assert found == pytest.approx([0.537883, 1.761594], abs=1e-6)
    assert coefficients_of([3.0, 3.0, 3.0], alpha=1.0) == [1.0, 1.0, 1.0]


def test_beta_is_the_largest_coefficient() -> None:
    found = coefficients_of([2.0, 1.0], alpha=1.0, beta=1.5)
    assert found == pytest.approx([0.537883, 1 + 0.5 * math.tanh(1.0)], abs=1e-6)
    assert coefficients_of([1.0, 0.0], alpha=1.0, beta=1.5) == pytest.approx(
        [1 - math.tanh(1), 1.5]
    )


def test_nothing_to_compare_leaves_the_gradients() -> None:
    assert coefficients_of([0.0, 0.0], alpha=1.0) == [1.0, 1.0]


def test_of_three_each_is_compared_with_the_mean_of_the_others() -> None:
    """As the authors' code for three modalities does."""
    s = [3.0, 1.0, 0.5]
    ratios = [(s[1] + s[2]) / 2 / s[0], (s[0] + s[2]) / 2 / s[1], (s[0] + s[1]) / 2 / s[2]]
    expected = [1 + math.tanh(0.7 * (ratio - 1)) for ratio in ratios]
    assert coefficients_of(s, alpha=0.7) == pytest.approx(expected, abs=1e-6)


def net() -> MultiHeadLateFusion:
    torch.manual_seed(0)
    encoders = {"a": nn.Sequential(nn.Linear(6, 5), nn.Tanh()), "b": nn.Linear(4, 3)}
    return MultiHeadLateFusion(encoders, {"a": 5, "b": 3}, num_classes=3)


def batch_of(step: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(step)
    target = torch.randint(3, (9,), generator=generator)
    a = torch.randn(9, 6, generator=generator) + 0.5 * target.unsqueeze(1)
    return {"a": a, "b": torch.randn(9, 4, generator=generator)}, target


def published(model: MultiHeadLateFusion, alpha: float, steps: int) -> list[tuple[float, float]]:
    """The released step, written literally; without the classifiers' weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    coefficients = []
    for step in range(steps):
        batch, label = batch_of(step)
        optimizer.zero_grad()
        out = model(batch)
        sum(
            (cross_entropy(out[name], label) for name in ("fused", "a", "b")), torch.zeros(())
        ).backward()
        rows = [[out[name][i].softmax(0)[label[i]] for i in range(len(label))] for name in "ab"]
        score_0, score_1 = (torch.stack(row).mean().item() for row in rows)
        ratio_0, ratio_1 = score_1 / score_0, score_0 / score_1
        pair = tuple(1 + math.tanh(alpha * (ratio - 1)) for ratio in (ratio_0, ratio_1))
        for name, parameter in model.named_parameters():
            if "encoders.a" in name:
                parameter.grad *= pair[0]
            if "encoders.b" in name:
                parameter.grad *= pair[1]
        optimizer.step()
        coefficients.append(pair)
    return coefficients  # type: ignore[return-value]


def test_agrees_with_the_published_step_over_twenty_steps() -> None:
    theirs, ours = net(), net()
    expected = published(theirs, 0.8, 20)
    balancer = mmbal_fast.MLB(ours.encoders, alpha=0.8)
    uniform = mmbal_fast.LossWeighting(["a", "b", "fused"], weights=[1.0, 1.0, 1.0])
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    for step in range(20):
        batch, label = batch_of(step)
        optimizer.zero_grad()
        out = ours(batch)
        uniform.loss(out, label).backward()
        record = balancer.step({name: out[name] for name in "ab"}, label)
        optimizer.step()
        torch.testing.assert_close(
            record.coefficients, torch.tensor(expected[step]), rtol=1e-4, atol=1e-5
        )
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert max(k for pair in expected for k in pair) > 1.05
