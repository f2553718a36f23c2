from __future__ import annotations

import copy
import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbal_fast import GradientBlending, estimate_blending_weights
from mmbal_fast.nn import MultiHeadLateFusion

NAN = math.nan


class Losses(nn.Module):
    """Stands in for a model: what training a head changes is written down in advance."""

    def __init__(self, train: list[list[float]], validation: list[list[float]]) -> None:
        super().__init__()
        self.table = torch.tensor([train, validation], dtype=torch.float64)  # [2, before/after, K]
        self.trained = nn.Parameter(torch.zeros(len(train[0]), dtype=torch.float64))

    def evaluate(self) -> tuple[Tensor, Tensor]:
        done = self.trained.detach().bool()
        # A head that is trained beside others would show as NaN.
        after = torch.where(done.sum() == 1, self.table[:, 1], NAN)
        train, validation = torch.where(done, after, self.table[:, 0])
        return train, validation


def train_losses(model: nn.Module, weights: Tensor) -> None:
    assert isinstance(model, Losses)
    with torch.no_grad():
        model.trained.add_(weights)


def evaluate_losses(model: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(model, Losses)
    return model.evaluate()


def test_weights_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    model = Losses([[1.0, 1.0, 1.0], [0.4, 0.3, 0.4]], [[1.0, 1.0, 1.0], [0.5, 0.5, 1.2]])
    estimate = estimate_blending_weights(
        model, ["audio", "image", "fused"], train_losses, evaluate_losses, epochs=1
    )
    torch.testing.assert_close(estimate.generalization, model.table.new_tensor([0.5, 0.5, -0.2]))
    torch.testing.assert_close(estimate.overfitting, model.table.new_tensor([0.1, 0.2, 0.8]))
    torch.testing.assert_close(estimate.ratio, model.table.new_tensor([0.2, 0.4, 4.0]))
    torch.testing.assert_close(estimate.weights, model.table.new_tensor([0.8, 0.2, 0.0]))
    assert capsys.readouterr().out.splitlines() == [
        "head        dG       dO      OGR   weight",
        "audio   0.5000   0.1000   0.2000   0.8000",
        "image   0.5000   0.2000   0.4000   0.2000",
        "fused  -0.2000   0.8000   4.0000   0.0000",
    ]
    blending = GradientBlending(estimate.names, weights=estimate.weights)
    assert torch.equal(blending.weights, estimate.weights)


def test_no_head_gained_warns() -> None:
    model = Losses([[1.0, 1.0], [0.5, NAN]], [[1.0, 1.0], [1.5, NAN]])
    with pytest.warns(RuntimeWarning, match="no head gained"):
        estimate = estimate_blending_weights(
            model, ["audio", "fused"], train_losses, evaluate_losses, epochs=1, verbose=False
        )
    assert estimate.weights.tolist() == [0.5, 0.5]
    assert model.trained.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("verbose", [True, False])
def test_what_is_called_and_shown(
    verbose: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    model = nn.Linear(2, 1)
    trained, evaluated = [], 0

    def train(model: nn.Module, weights: Tensor) -> None:
        trained.append(weights.tolist())
        weights.zero_()  # the callback's own

    def evaluate(model: nn.Module) -> tuple[dict[str, float], list[float]]:
        nonlocal evaluated
        evaluated += 1
        return {"fused": 1.0, "audio": 1.0 - 0.1 * evaluated}, [1.0 / evaluated, 1.0 / evaluated]

    estimate_blending_weights(model, ["audio", "fused"], train, evaluate, epochs=3, verbose=verbose)
    assert trained == [[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3
    assert evaluated == 3
    out, err = capsys.readouterr()
    assert ("weight" in out) == verbose
    assert ("fused: epoch 3 of 3" in err) == verbose
    if not verbose:
        assert out == err == ""


def test_progress_bar_is_optional(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    model = Losses([[1.0, 1.0], [0.4, 0.3]], [[1.0, 1.0], [0.5, 0.5]])
    estimate_blending_weights(model, ["a", "b"], train_losses, evaluate_losses, epochs=2)
    out, err = capsys.readouterr()
    assert "weight" in out
    assert err == ""


# --- restoring -----------------------------------------------------------------------------------


class Scratch(nn.Module):
    """Holds state in every place that a module has for it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor
        self.replaced: Tensor
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.register_buffer("replaced", torch.zeros(2))
        self.plain = torch.zeros(2)
        self.calls = 0

    def get_extra_state(self) -> int:
        return self.calls

    def set_extra_state(self, state: int) -> None:
        self.calls = state

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.hidden += 1
        self.replaced = self.replaced + 1
        self.plain += 1
        return x


class Run:
    """A small training run with everything that has to come back."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.scratch, self.norm = Scratch(), nn.BatchNorm1d(6)
        encoders = {
            "audio": nn.Sequential(nn.Linear(4, 6), self.norm, nn.Dropout(0.3), self.scratch),
            "image": nn.Linear(4, 6),
        }
        self.model = MultiHeadLateFusion(encoders, {"audio": 6, "image": 6}, num_classes=3)
        self.heads = self.model.head_names
        self.model.encoders["image"].bias.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.5)
        self.generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(60, 4)
        self.y = (self.x[:, 0] > 0).long() + (self.x[:, 1] > 0).long()
        self.seen: list[Tensor] = []

    def train(self, model: nn.Module, weights: Tensor) -> None:
        model.train()
        order = torch.randperm(40, generator=self.generator)
        self.seen.append(order)
        blending = GradientBlending(self.heads, weights=weights)
        for index in order.split(16):
            # Draws from every generator matter to what is learned.
            noise = random.random() + np.random.rand() + torch.rand(())
            x = self.x[index] + 0.01 * noise
            self.optimizer.zero_grad(set_to_none=False)  # gradients change in place
            blending.loss(model({"audio": x, "image": x}), self.y[index]).backward()
            self.optimizer.step()
        self.scheduler.step()

    def evaluate(self, model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
        model.eval()
        random.random()
        with torch.no_grad():
            logits = model({"audio": self.x, "image": self.x})
        losses = {
            name: F.cross_entropy(each, self.y, reduction="none") for name, each in logits.items()
        }
        return (
            {name: each[:40].mean().item() for name, each in losses.items()},
            {name: each[40:].mean().item() for name, each in losses.items()},
        )

    def estimate(self, train=None, evaluate=None) -> Tensor:
        return estimate_blending_weights(
            self.model,
            self.heads,
            train or self.train,
            evaluate or self.evaluate,
            epochs=2,
            restore=[self.optimizer, self.scheduler, self.generator],
            verbose=False,
        ).weights

    def state(self) -> dict:
        return copy.deepcopy(
            {
                "values": dict(self.model.named_parameters()),
                "buffers": dict(self.model.named_buffers()),
                "plain": self.scratch.plain,
                "extra": self.scratch.calls,
                "grads": {n: p.grad for n, p in self.model.named_parameters()},
                "requires_grad": [p.requires_grad for p in self.model.parameters()],
                "modes": [m.training for m in self.model.modules()],
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "generator": self.generator.get_state(),
                "python": random.getstate(),
                "numpy": np.random.get_state(),
                "torch": torch.get_rng_state(),
            }
        )

    def identities(self) -> list[int]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return [id(each) for each in tensors] + [id(p.grad) for p in self.model.parameters()]


def assert_same(one: object, other: object) -> None:
    if isinstance(one, (Tensor, np.ndarray)):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert isinstance(other, (list, tuple))
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def a_run_in_the_middle() -> Run:
    """With momentum in the optimizer, gradients, and one module in evaluation mode."""
    run = Run()
    run.train(run.model, torch.tensor([0.3, 0.3, 0.4]))
    run.norm.eval()
    return run


def test_everything_is_restored() -> None:
    run = a_run_in_the_middle()
    before, identities = run.state(), run.identities()
    run.estimate()
    assert_same(run.state(), before)
    assert run.identities() == identities


def test_a_fresh_run_is_restored() -> None:
    run = Run()
    before = run.state()
    run.estimate()
    assert_same(run.state(), before)
    assert run.optimizer.state_dict()["state"] == {}


def test_training_goes_on_as_if_nothing_had_been() -> None:
    states = []
    for estimates in (False, True):
        run = a_run_in_the_middle()
        if estimates:
            run.estimate()
        run.train(run.model, torch.tensor([0.3, 0.3, 0.4]))
        states.append(run.state())
    assert_same(states[1], states[0])


def test_every_head_starts_from_the_same_state() -> None:
    run = a_run_in_the_middle()
    run.seen.clear()
    states = []

    def train(model: nn.Module, weights: Tensor) -> None:
        if len(run.seen) % 2 == 0:
            states.append(run.state())
        run.train(model, weights)

    run.estimate(train=train)
    assert len(states) == 3
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])
    for epoch in range(2):
        assert torch.equal(run.seen[epoch], run.seen[2 + epoch])
        assert torch.equal(run.seen[epoch], run.seen[4 + epoch])
    assert not torch.equal(run.seen[0], run.seen[1])


@pytest.mark.parametrize("callback", ["train", "evaluate"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_restored_when_a_callback_raises(
    callback: str, error: type[BaseException]
) -> None:
    run = a_run_in_the_middle()
    before, identities = run.state(), run.identities()
    calls = 0

    def fails(model: nn.Module, *args: Tensor):
        nonlocal calls
        calls += 1
        result = getattr(run, callback)(model, *args)
        if calls == 3:
            raise error("out of memory")
        return result

    with pytest.raises(error, match="out of memory"):
        run.estimate(**{callback: fails})
    assert calls == 3
    assert_same(run.state(), before)
    assert run.identities() == identities


def test_what_a_callback_replaced_or_froze_is_undone() -> None:
    run = a_run_in_the_middle()
    before, identities = run.state(), run.identities()

    def train(model: nn.Module, weights: Tensor) -> None:
        run.train(model, weights)
        layer = run.model.encoders["image"]
        layer.weight = nn.Parameter(torch.ones(6, 4))
        layer.register_buffer("extra", torch.ones(1))
        run.model.heads["fused"].requires_grad_(False)
        run.model.heads["fused"].weight.grad = None

    run.estimate(train=train)
    assert_same(run.state(), before)
    assert run.identities() == identities


def test_estimate_is_a_function_of_the_state() -> None:
    # With dropout and three generators in play, the same start gives the same weights.
    run = a_run_in_the_middle()
    first = run.estimate()
    assert torch.equal(run.estimate(), first)
    assert torch.equal(a_run_in_the_middle().estimate(), first)
    assert first.max() > first.min()


# --- bad arguments -------------------------------------------------------------------------------


def test_bad_arguments_are_refused_before_anything_runs() -> None:
    model = Losses([[1.0, 1.0], [0.4, 0.3]], [[1.0, 1.0], [0.5, 0.5]])

    def refused(match: str, heads: list[str], **options) -> None:
        def never(*args: object):
            pytest.fail("called")

        with pytest.raises(ValueError, match=match):
            estimate_blending_weights(model, heads, never, never, **options)

    refused(r"heads must be at least two \(got \['a'\]\)", ["a"], epochs=1)
    refused(r"differ in name \(got \['a', 'a'\]\)", ["a", "a"], epochs=1)
    refused(r"epochs must be at least 1 \(got 0\)", ["a", "b"], epochs=0)
    refused(r"floor must be a positive number \(got -1\)", ["a", "b"], epochs=1, floor=-1)


def test_losses_of_other_heads_are_refused() -> None:
    model = Losses([[1.0, 1.0], [0.4, 0.3]], [[1.0, 1.0], [0.5, 0.5]])
    with pytest.raises(ValueError, match=r"losses must be \[3\] \(got \[2\]\)"):
        estimate_blending_weights(model, ["a", "b", "c"], train_losses, evaluate_losses, epochs=1)
    assert model.trained.tolist() == [0.0, 0.0]
