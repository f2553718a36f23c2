"""Steps that would silently do nothing, or the wrong thing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

import mmbal_fast
from mmbal_fast import functional

LABELS = torch.tensor([0, 1, 2, 0])
LOGITS = {"a": torch.eye(3)[LABELS] * 5, "b": torch.zeros(4, 3)}
SCALE = 2.0**10


def net_with_gradients() -> Any:
    torch.manual_seed(0)
    net = nn.ModuleDict({name: nn.Linear(5, 4) for name in "ab"})
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    return net


# ---- where the classes are


def test_token_logits_with_the_classes_last() -> None:
    """``[B, T, C]`` with T = C cannot be told from ``[B, C, T]`` by its shape."""
    generator = torch.Generator().manual_seed(1)
    logits = {name: torch.randn(4, 3, 3, generator=generator) for name in "ab"}
    target = torch.randint(3, (4, 3), generator=generator)
    balancer = mmbal_fast.OGMGE(net_with_gradients(), alpha=0.5)
    found = balancer.step(logits, target, class_dim=-1).scores.clone()
    flat = [each.reshape(12, 3) for each in logits.values()]
    expected = functional.contribution_scores(flat, target.reshape(12))
    torch.testing.assert_close(found, expected)
    wrong = balancer.step(logits, target).scores
    assert not torch.allclose(wrong, expected)
    soft = nn.functional.one_hot(target, 3).float()
    torch.testing.assert_close(balancer.step(logits, soft, class_dim=2).scores, expected)


def test_losses_of_token_logits_with_the_classes_last() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = {name: torch.randn(4, 3, 3, generator=generator) for name in "ab"}
    target = torch.randint(3, (4, 3), generator=generator)
    blending = mmbal_fast.GradientBlending(["a", "b"])
    found = blending.loss(logits, target, class_dim=-1)
    flat = {name: each.reshape(12, 3) for name, each in logits.items()}
    torch.testing.assert_close(found, blending.loss(flat, target.reshape(12)))


# ---- the user's own scores, and rules that need them


def test_scores_of_the_users_own() -> None:
    net = net_with_gradients()
    balancer = mmbal_fast.OGMGE(net, alpha=0.5, noise=0.0)
    before = net["a"].weight.grad.clone()
    balancer.observe(scores={"b": torch.tensor(1.0), "a": 3.0})
    record = balancer.step()
    assert record.scores.tolist() == [3.0, 1.0]
    expected = functional.modulation_coefficients(record.ratios, 0.5)
    assert torch.equal(record.coefficients, expected)
    assert torch.equal(net["a"].weight.grad, record.coefficients[0] * before)
    balancer.observe(scores=torch.tensor([1.0, 2.0]))
    balancer.observe(scores=torch.tensor([1.0, 2.0]))
    assert balancer.step().scores.tolist() == [2.0, 4.0]


def test_a_rule_may_take_the_scores() -> None:
    net = net_with_gradients()

    def rule(ratios: Tensor, scores: Tensor) -> Tensor:
        return scores.min() / scores

    balancer = mmbal_fast.OGMGE(net, alpha=0.5, rule=rule)
    balancer.observe(scores=torch.tensor([4.0, 1.0]))
    assert balancer.step().coefficients.tolist() == [0.25, 1.0]


# ---- scalers and what wraps optimizers


class Wrapper:
    """Such as frameworks put around an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return self.optimizer.step(*args, **kwargs)


class Subclassed(torch.optim.SGD):
    """As Accelerate's: an optimizer itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))], lr=0.1)
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return self.optimizer.step(*args, **kwargs)


@pytest.mark.parametrize("kind", [Wrapper, Subclassed])
@pytest.mark.parametrize("scaler_steps", ["the wrapper", "what it wraps"])
@pytest.mark.parametrize("unscaled_before", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_wrapped_optimizers_are_unscaled_once(
    kind: type, scaler_steps: str, unscaled_before: bool, enabled: bool
) -> None:
    results = []
    for wrapped in (False, True):
        net = net_with_gradients()
        inner = torch.optim.SGD(net.parameters(), lr=1.0)
        outer = kind(inner) if wrapped else inner
        stepped = outer if scaler_steps == "the wrapper" else inner
        scaler = GradScaler("cpu", init_scale=SCALE)
        scaler.scale(torch.ones(()))
        for parameter in net.parameters():
            parameter.grad *= SCALE
        balancer = mmbal_fast.OGMGE(net, alpha=0.5)
        balancer.enabled = enabled
        if unscaled_before:
            scaler.unscale_(stepped)
        balancer.step(LOGITS, LABELS, grad_scaler=scaler, optimizer=outer)
        scaler.step(stepped)
        scaler.update()
        results.append([each.detach().clone() for each in net.parameters()])
    assert all(map(torch.equal, *results))


# ---- gradients that are not final


def test_gradients_that_per_sample_gradients_will_replace_are_refused() -> None:
    net = net_with_gradients()
    balancer = mmbal_fast.OGMGE(net, alpha=0.5)
    balancer.step(LOGITS, LABELS)
    before = net["a"].weight.grad.clone()
    for parameter in net.parameters():
        parameter.grad_sample = torch.zeros(4, *parameter.shape)
    with pytest.raises(RuntimeError, match=r"'a.weight' must be final.*attach_step_hook"):
        balancer.step(LOGITS, LABELS)
    assert torch.equal(net["a"].weight.grad, before)
    for parameter in net.parameters():  # as Opacus marks them once it has clipped
        parameter.grad_sample._processed = True
    balancer.step(LOGITS, LABELS)
    assert not torch.equal(net["a"].weight.grad, before)
