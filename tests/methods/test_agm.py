"""AGM: worked values, the published step, and what it promises beyond the contract."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mmbal_fast
from mmbal_fast.nn import shapley_logits, unimodal_logits


def certain(scores: Sequence[float]) -> dict[str, Tensor]:
    """Logits of one sample of class 0 whose log-probabilities are minus these."""
    names = "abcdefgh"[: len(scores)]
    rows = [torch.tensor([[-s, math.log(-math.expm1(-s))]]) for s in scores]
    return dict(zip(names, rows, strict=True))


def balancer_of(count: int, **options: Any) -> tuple[mmbal_fast.AGM, list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.zeros(2, 2)) for _ in range(count)]
    for each in parameters:
        each.grad = torch.ones(2, 2)
    modalities = {name: [each] for name, each in zip("abcdefgh", parameters, strict=False)}
    return mmbal_fast.AGM(modalities, **options), parameters


ZERO = torch.zeros(1, dtype=torch.int64)


def test_worked_values_of_two_modalities() -> None:
    balancer, parameters = balancer_of(2)
    record = balancer.step(certain([0.5, 1.0]), ZERO)
    torch.testing.assert_close(record.scores, torch.tensor([-0.5, -1.0]))
    torch.testing.assert_close(record.ratios, torch.tensor([1.648721, 0.606531]))
    torch.testing.assert_close(record.coefficients, torch.tensor([0.522714, 1.482114]))
    for parameter, k in zip(parameters, record.coefficients, strict=True):
        assert torch.equal(parameter.grad, k.expand(2, 2))
    balancer, _ = balancer_of(3)
    record = balancer.step(certain([0.7, 0.7, 0.7]), ZERO)
    torch.testing.assert_close(record.coefficients, torch.ones(3))


def test_the_exponent_of_three_is_the_mean_lead_over_the_others() -> None:
    scores = [0.5, 1.0, 2.0]
    balancer, _ = balancer_of(3, alpha=0.7)
    record = balancer.step(certain(scores), ZERO)
    for m, found in enumerate(record.coefficients.tolist()):
        others = [s for j, s in enumerate(scores) if j != m]
        ratio = math.exp(sum(other - scores[m] for other in others) / 2)
        assert found == pytest.approx(math.exp(0.7 * min(1 - ratio, 10)), rel=1e-5)


def test_the_difference_is_cut_off_at_ten_and_probabilities_at_a_floor() -> None:
    balancer, _ = balancer_of(2)
    balancer.step(certain([0.1, 4.0]), ZERO)  # on average far ahead
    record = balancer.step({"a": torch.tensor([[-90.0, 0.0]]), "b": torch.zeros(1, 2)}, ZERO)
    assert record.scores[0].item() == pytest.approx(math.log(1e-8), rel=1e-6)
    assert record.coefficients[0].item() == pytest.approx(math.exp(10), rel=1e-5)


def test_this_steps_score_enters_the_mean_afterwards() -> None:
    balancer, _ = balancer_of(2)
    steps = [[0.5, 1.0], [1.5, 0.2], [0.3, 0.9]]
    means = [0.0, 0.0]
    for number, scores in enumerate(steps):
        tau = math.exp(means[1] - means[0])
        ratio = math.exp(scores[1] - scores[0])
        record = balancer.step(certain(scores), ZERO)
        assert record.coefficients[0].item() == pytest.approx(math.exp(tau - ratio), rel=1e-5)
        means = [(mean * number + s) / (number + 1) for mean, s in zip(means, scores, strict=True)]
    state = balancer.state_dict()
    assert state["averaged"] == 3
    torch.testing.assert_close(state["means"], -torch.tensor(means))


class AudioVisual(nn.Module):
    """Encoders that give nothing for nothing, so that muted inputs are muted features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.audio = nn.Sequential(nn.Linear(6, 7, bias=False), nn.Tanh(), nn.Linear(7, 5, False))
        self.visual = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def features(self, audio: Tensor, visual: Tensor) -> dict[str, Tensor]:
        return {"audio": self.audio(audio), "visual": self.visual(visual)}

    def forward(self, audio: Tensor, visual: Tensor) -> Tensor:
        return self.head(torch.cat(list(self.features(audio, visual).values()), dim=1))


def batch_of(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    target = torch.randint(3, (9,), generator=generator)
    audio = torch.randn(9, 6, generator=generator) + 2 * target.unsqueeze(1)
    return audio, torch.randn(9, 4, generator=generator) + 0.5 * target.unsqueeze(1), target


def published(model: AudioVisual, steps: int, alpha: float) -> list[tuple[float, float]]:
    """The released training, written literally: hooks scale what enters each Shapley logit."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mean_a, mean_v, coefficients = 0.0, 0.0, []
    for step in range(steps):
        audio, visual, label = batch_of(step)
        optimizer.zero_grad()
        out = model(audio, visual)
        without_audio = model(torch.zeros_like(audio), visual)
        without_visual = model(audio, torch.zeros_like(visual))
        out_a = 0.5 * (out - without_audio + without_visual)
        out_v = 0.5 * (out - without_visual + without_audio)
        score_a = score_v = 0.0
        for i in range(len(label)):
            for each in ("a", "v"):
                row = (out_a if each == "a" else out_v)[i].detach().softmax(0)[label[i]].item()
                score = -math.log(max(row, 1e-8)) / len(label)
                score_a, score_v = (
                    (score_a + score, score_v) if each == "a" else (score_a, score_v + score)
                )
        k_a = math.exp(alpha * min(math.exp(mean_v - mean_a) - math.exp(score_v - score_a), 10))
        k_v = math.exp(alpha * min(math.exp(mean_a - mean_v) - math.exp(score_a - score_v), 10))
        mean_a = mean_a * step / (step + 1) + score_a / (step + 1)
        mean_v = mean_v * step / (step + 1) + score_v / (step + 1)
        out_a.register_hook(lambda grad, k=k_a: grad * k)
        out_v.register_hook(lambda grad, k=k_v: grad * k)
        cross_entropy(out_a + out_v, label).backward()
        optimizer.step()
        coefficients.append((k_a, k_v))
    return coefficients


def test_agrees_with_the_published_step_over_twenty_steps() -> None:
    theirs, ours = AudioVisual(), AudioVisual()
    expected = published(theirs, 20, alpha=0.8)
    balancer = mmbal_fast.AGM(
        {"audio": ours.audio, "visual": ours.visual},
        alpha=0.8,
        head=ours.head,
        widths={"audio": 5, "visual": 3},
    )
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    for step in range(20):
        audio, visual, label = batch_of(step)
        optimizer.zero_grad()
        features = ours.features(audio, visual)
        cross_entropy(ours.head(torch.cat(list(features.values()), 1)), label).backward()
        record = balancer.step(unimodal_logits(features, ours.head), label)
        optimizer.step()
        torch.testing.assert_close(
            record.coefficients, torch.tensor(expected[step]), rtol=1e-4, atol=1e-5
        )
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert max(k for pair in expected for k in pair) > 1.05
    assert min(k for pair in expected for k in pair) < 0.95


class Fixed(mmbal_fast.AGM):
    """With coefficients that no scores of two modalities give."""

    def _derive(self, *, summed: bool) -> None:
        self._rows[2] = torch.tensor([0.5, 2.0])


def test_the_heads_bias_is_scaled_by_the_mean_coefficient() -> None:
    head = nn.Linear(3, 2)
    encoders = {name: [nn.Parameter(torch.zeros(1))] for name in "ab"}
    balancer = Fixed(encoders, head=head, widths={"a": 1, "b": 2})
    for parameter in [*head.parameters(), *(each for group in encoders.values() for each in group)]:
        parameter.grad = torch.ones_like(parameter)
    balancer.step(certain([0.5, 1.0]), ZERO)
    assert head.bias.grad.tolist() == [1.25, 1.25]  # type: ignore[union-attr]
    assert head.weight.grad.tolist() == [[0.5, 2.0, 2.0]] * 2  # type: ignore[union-attr]


def test_micro_batches_weigh_what_they_hold() -> None:
    logits, target = torch.randn(2, 7, 3), torch.tensor([0, 1, 2, -100, 1, 1, 0])
    whole, _ = balancer_of(2)
    parts, _ = balancer_of(2)
    expected = whole.step(dict(zip("ab", logits, strict=True)), target).clone()
    for part in (slice(0, 2), slice(2, 7)):
        parts.observe(dict(zip("ab", logits[:, part], strict=True)), target[part])
    found = parts.step()
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.coefficients, expected.coefficients)


def test_a_step_without_labels_leaves_everything() -> None:
    balancer, parameters = balancer_of(2)
    balancer.step(certain([0.5, 1.0]), ZERO)
    before = balancer.state_dict()
    parameters[0].grad = torch.ones(2, 2)
    record = balancer.step({"a": torch.zeros(2, 2), "b": torch.ones(2, 2)}, torch.full((2,), -100))
    assert record.coefficients.tolist() == [1.0, 1.0]
    after = balancer.state_dict()
    assert torch.equal(after["means"], before["means"])
    assert after["averaged"] == before["averaged"]


def test_soft_labels_and_own_scores() -> None:
    logits = {name: torch.randn(4, 3) for name in "ab"}
    target = torch.tensor([0, 2, 1, 1])
    hard, _ = balancer_of(2)
    soft, _ = balancer_of(2)
    own, _ = balancer_of(2)
    expected = hard.step(logits, target).clone()
    torch.testing.assert_close(
        soft.step(logits, nn.functional.one_hot(target, 3).float()).coefficients,
        expected.coefficients,
    )
    own.observe(scores={name: -cross_entropy(each, target) for name, each in logits.items()})
    torch.testing.assert_close(own.step().coefficients, expected.coefficients)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"head": nn.Linear(3, 2)}, "head needs widths"),
        ({"head": nn.Linear(3, 2), "widths": {"a": 1}}, "head needs widths"),
        ({"head": nn.Linear(3, 2), "widths": {"a": 1, "b": 1}}, "widths must add up to"),
        ({"head": nn.Linear(3, 2), "widths": {"a": 0, "b": 3}}, "widths must be from 1"),
        ({"head": nn.Linear(3, 2), "widths": {"a": 1.5, "b": 1.5}}, "widths must be a whole"),
        ({"head": nn.Conv1d(3, 2, 1), "widths": {"a": 1, "b": 2}}, "head must be an nn.Linear"),
        ({"alpha": float("nan")}, "alpha must be"),
    ],
)
def test_bad_settings(options: dict[str, Any], what: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^AGM: {what}.*\(got"):
        balancer_of(2, **options)


def test_a_head_that_is_an_encoders_is_refused() -> None:
    head = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"head must belong to no modality \(got"):
        mmbal_fast.AGM({"a": head, "b": nn.Linear(2, 2)}, head=head, widths={"a": 1, "b": 1})


# ---- Shapley logits


def gated(x: dict[str, Tensor]) -> Tensor:
    return x["a"] * torch.sigmoid(x["v"]) + 2 * x["v"] + 1


def test_shapley_logits_of_two_are_the_published_ones() -> None:
    a, v = torch.randn(2, 5, 3)
    zero = torch.zeros_like(a)
    both, only_v, only_a = (gated({"a": x, "v": y}) for x, y in [(a, v), (zero, v), (a, zero)])
    found = shapley_logits(gated, {"a": a, "v": v})
    torch.testing.assert_close(found["a"], (both - only_v + only_a) / 2)
    torch.testing.assert_close(found["v"], (both - only_a + only_v) / 2)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shapley_logits_add_up_and_cost_what_is_said(count: int) -> None:
    calls = 0

    def forward(x: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.stack(list(x.values())).cumprod(0).sum(0) + 3

    features = {str(i): torch.randn(4, 2) for i in range(count)}
    found = shapley_logits(forward, features)
    assert calls == 2**count - 1
    assert list(found) == list(features)
    torch.testing.assert_close(torch.stack(list(found.values())).sum(0), forward(features))


def test_shapley_logits_of_a_linear_head_are_its_shares() -> None:
    head = nn.Linear(9, 4)
    features = {name: torch.randn(5, width) for name, width in (("a", 2), ("b", 3), ("c", 4))}
    found = shapley_logits(lambda x: head(torch.cat(list(x.values()), 1)), features)
    for name, expected in unimodal_logits(features, head).items():
        torch.testing.assert_close(found[name], expected)


def test_shapley_logits_refuse_what_they_cannot_use() -> None:
    with pytest.raises(ValueError, match="at least one modality"):
        shapley_logits(gated, {})
    with pytest.raises(TypeError, match="must be a mapping"):
        shapley_logits(gated, [torch.zeros(1)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must return a tensor \(got int\)"):
        shapley_logits(lambda x: 3, {"a": torch.zeros(1)})  # type: ignore[arg-type, return-value]
