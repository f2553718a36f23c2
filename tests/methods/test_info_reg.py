"""InfoReg: worked values, the published step, its window and its memory."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mmbal_fast
from mmbal_fast import functional
from mmbal_fast.bench._baselines import published_pull_
from mmbal_fast.nn import unimodal_logits

if TYPE_CHECKING:
    from tests.conftest import Backend

WIDTHS = {"audio": 5, "visual": 3, "text": 2}


class Net(nn.Module):
    def __init__(self, count: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        names = list(WIDTHS)[:count]
        self.encoders = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(4, WIDTHS[name]), nn.Tanh()) for name in names}
        )
        self.head = nn.Linear(sum(WIDTHS[name] for name in names), 3)

    def features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: encoder(batch[name]) for name, encoder in self.encoders.items()}


def batch_of(step: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(step)
    target = torch.randint(3, (9,), generator=generator)
    batch = {name: torch.randn(9, 4, generator=generator) for name in WIDTHS}
    batch["audio" if step % 3 else "visual"] += 1.5 * target.unsqueeze(1)  # who leads changes
    return batch, target


def losses_of(net: Net, step: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    batch, target = batch_of(step)
    features = net.features(batch)
    logits = unimodal_logits(features, net.head)
    fused = cross_entropy(net.head(torch.cat(list(features.values()), 1)), target)
    alone = [cross_entropy(each, target) for each in logits.values()]
    return fused + torch.stack(alone).sum(), logits, target


def started(scores: dict[str, float], **options: Any) -> tuple[mmbal_fast.InfoReg, list[float]]:
    encoders = {name: [nn.Parameter(torch.ones(2, 2))] for name in scores}
    for (parameter,) in encoders.values():
        parameter.grad = torch.ones(2, 2)
    method = mmbal_fast.InfoReg(encoders, **options)
    method.start_epoch()
    method.observe(scores=scores)
    return method, method.step().coefficients.tolist()


def test_worked_values() -> None:
    strengths = {"audio": 0.95, "visual": 0.1}
    _, found = started({"audio": 1.0, "visual": 0.0}, strengths=strengths)
    assert found == pytest.approx([2.034603, 0.0], abs=1e-6)
    _, found = started({"audio": 0.0, "visual": 1.0}, strengths=strengths)
    assert found == pytest.approx([0.0, 0.214169], abs=1e-6)
    _, found = started({"audio": 0.5, "visual": 0.5})
    assert found == [0.0, 0.0]


def test_of_three_each_is_compared_with_the_mean_of_the_others() -> None:
    _, found = started({"a": 0.9, "b": 0.6, "c": 0.3})
    assert found == pytest.approx([0.95 * math.exp(math.tanh(0.45)), 0.0, 0.0], abs=1e-6)
    _, found = started({"a": 0.9, "b": 0.8, "c": 0.1})
    leads = [0.45, 0.3]
    assert found == pytest.approx([*(0.95 * math.exp(math.tanh(x)) for x in leads), 0.0], abs=1e-6)


def test_the_first_step_of_an_epoch_changes_nothing() -> None:
    method, (beta, _) = started({"a": 1.0, "b": 0.0})
    (parameter,) = method._groups.parameters[:1]
    assert beta > 2
    assert torch.equal(parameter.grad, torch.ones(2, 2))
    parameter.data += 0.5
    method.observe(scores={"a": 1.0, "b": 0.0})
    method.step()
    torch.testing.assert_close(parameter.grad, torch.full((2, 2), 1 + beta * 0.5))


def published(model: Net, epochs: int, steps: int) -> list[tuple[float, float]]:
    """The released training, written literally, but for scores that are means over the batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    audio_trace_list, betas = [0.0] * 10, []
    for epoch in range(epochs):
        if epoch == 0:
            k = 1.0
        else:
            tr1 = sum(audio_trace_list[-10:]) / 10
            tr2 = sum(audio_trace_list[-11:-1]) / 10
            k = (tr1 - tr2) / tr1
        global_model = copy.deepcopy(model)
        fim = torch.zeros_like(model.encoders["audio"][0].weight)  # type: ignore[index]
        for step in range(steps):
            optimizer.zero_grad()
            loss, logits, label = losses_of(model, epoch * steps + step)
            loss.backward()
            score_a, score_v = (
                sum(logits[name].softmax(1)[i][label[i]].item() for i in range(9)) / 9
                for name in ("audio", "visual")
            )
            beta = beta2 = 0.0
            if score_a > score_v and k > 0.05:
                beta = 0.95 * math.exp(math.tanh(score_a - score_v))
            elif score_a < score_v and k > 0.05:
                beta2 = 0.1 * math.exp(math.tanh(score_v - score_a))
            named = [(n, p) for n, p in model.named_parameters() if "audio" in n or "visual" in n]
            squares = published_pull_(
                [p.grad for _, p in named if p.grad is not None],
                [p for _, p in named],
                [global_model.get_parameter(n) for n, _ in named],
                [beta if "audio" in n else beta2 for n, _ in named],
            )
            fim += dict(zip((n for n, _ in named), squares, strict=True))["encoders.audio.0.weight"]
            optimizer.step()
            betas.append((beta, beta2))
        audio_trace_list.append(fim.mean().item())
    return betas


def ours(model: Net, epochs: int, steps: int, **options: Any) -> tuple[list[Tensor], Any]:
    method = mmbal_fast.InfoReg(model.encoders, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    found = []
    for epoch in range(epochs):
        method.start_epoch()
        for step in range(steps):
            optimizer.zero_grad()
            loss, logits, target = losses_of(model, epoch * steps + step)
            loss.backward()
            found.append(method.step(logits, target).coefficients.clone())
            optimizer.step()
    return found, method


def test_agrees_with_the_published_training_over_forty_eight_steps() -> None:
    theirs, mine = Net(), Net()
    expected = torch.tensor(published(theirs, 24, 2))
    found, method = ours(mine, 24, 2, strengths={"audio": 0.95, "visual": 0.1}, watch="audio")
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (expected[:, 0] > 0).any()
    assert (expected[:, 1] > 0).any()
    assert (expected[4:].sum(1) == 0).any(), "the window never closed"
    assert method.state_dict()["epochs"] == 24


def test_three_modalities_train_and_each_has_its_own_window() -> None:
    found, method = ours(Net(3), 3, 4)
    assert (torch.stack(found) > 0).any()
    traces = method.state_dict()["traces"]
    assert traces.shape == (11, 3)
    assert (traces[-2:] > 0).all()


def test_the_window_closes_where_the_trace_no_longer_grows() -> None:
    method, _ = started({"a": 1.0, "b": 0.0})
    state = method.state_dict()
    state["epochs"] = 30
    state["traces"] = torch.ones(11, 2, dtype=torch.float64)
    method.load_state_dict(state)
    method.observe(scores={"a": 1.0, "b": 0.0})
    assert method.step().coefficients.tolist() == [0.0, 0.0]
    state["traces"][-1] = 2.0  # a mean of 1.1 after 1: it grew by 9 % of itself
    method.load_state_dict(state)
    method.observe(scores={"a": 1.0, "b": 0.0})
    assert method.step().coefficients[0] > 2


def test_the_trace_is_of_mean_squares_of_matrices_after_the_pull() -> None:
    """In float64, of every step of the epoch, nothing of biases."""
    parameters = {
        name: [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))] for name in "ab"
    }
    method = mmbal_fast.InfoReg(parameters, strengths=1.0)
    method.start_epoch()
    beta = math.exp(math.tanh(1.0))
    for moved in (0.0, 0.5):
        for group in parameters.values():
            for each in group:
                each.data.add_(moved)
                each.grad = torch.full_like(each, 2.0)
        method.observe(scores={"a": 1.0, "b": 0.0})
        method.step()
    (first, bias), _ = parameters.values()
    assert first.grad is not None
    assert bias.grad is not None
    pulled = 2.0 + beta * 0.5
    torch.testing.assert_close(first.grad, torch.full((2, 3), pulled))
    torch.testing.assert_close(bias.grad, torch.full((3,), pulled))
    trace = method.state_dict()["trace"]
    torch.testing.assert_close(
        trace, torch.tensor([4.0 + pulled**2, 8.0]).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("native", ["cuda-emulated"], indirect=True)
def test_one_launch_pulls_and_measures(native: Backend) -> None:
    assert native.native is not None
    grads, weights, anchors = (list(each.unbind()) for each in torch.randn(3, 5, 5000))
    beta = torch.tensor([0.5, 0.0])
    functional.pull_(grads, weights, anchors, beta, [0, 1, 0, 1, 1])  # allocates
    native.native.begin_capture()
    try:
        functional.pull_(grads, weights, anchors, beta, [0, 1, 0, 1, 1])
    finally:
        launches = native.native.end_capture()
    assert len(launches) == 1


def test_a_compiled_step(cpu: Backend) -> None:
    torch._dynamo.reset()
    nets = [Net(), Net()]
    with cpu.running():
        for net, compiled in zip(nets, (False, True), strict=True):
            method = mmbal_fast.InfoReg(net.encoders)
            step: Any = method.step
            if compiled:
                step = torch.compile(step, fullgraph=True, backend="eager")
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            for number in range(8):
                if number % 4 == 0:
                    method.start_epoch()
                optimizer.zero_grad()
                loss, logits, target = losses_of(net, number)
                loss.backward()
                step({name: each.detach() for name, each in logits.items()}, target)
                optimizer.step()
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(one, other)


def test_a_step_needs_an_epoch() -> None:
    net = Net()
    method = mmbal_fast.InfoReg(net.encoders)
    loss, logits, target = losses_of(net, 0)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"^InfoReg.step: needs start_epoch\(\) first \(got"):
        method.step(logits, target)
    method.enabled = False
    assert method.step(logits, target).coefficients.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"strengths": {"audio": 1.0}}, "strengths must be given for"),
        ({"strengths": -1.0}, "strengths must be a number from 0"),
        ({"watch": "smell"}, "watch must be one of"),
        ({"window": float("inf")}, "window must be"),
    ],
)
def test_bad_settings(options: dict[str, Any], what: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^InfoReg: {what}.*\(got"):
        mmbal_fast.InfoReg(Net().encoders, **options)
