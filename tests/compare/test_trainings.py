from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mmbal_fast._task import Loaders
from mmbal_fast.compare._data import Batches
from mmbal_fast.compare._network import Network
from mmbal_fast.compare._networks import FEATURES, LateFusion, signal_encoder
from mmbal_fast.compare._predictions import PREDICTIONS, Seen, told
from mmbal_fast.compare._trainings import TRAININGS, Outputs, Setup, Training
from mmbal_fast.compare._trial import load_task, setting

CLASSES = 3


def data(count: int, seed: int) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % CLASSES
    patterns = torch.eye(CLASSES, 6)
    inputs = {
        name: 5 * patterns[label] + torch.randn(count, 6, generator=generator) for name in "ab"
    }
    return Batches(inputs, label, 30, torch.Generator().manual_seed(seed))


def setup(epochs: int = 3) -> Setup:
    torch.manual_seed(0)
    loaders = Loaders(data(90, 0), data(60, 1), data(60, 2))
    model = LateFusion({name: nn.Linear(6, FEATURES) for name in "ab"}, CLASSES)
    network = Network(model, loaders.train)
    network.train()
    return Setup(network, loaders, torch.optim.SGD(network.parameters(), lr=0.05), epochs, 0)


def trained(training: Training) -> Training:
    training.prepare()
    for _ in range(training.setup.epochs):
        for inputs, target in training.setup.loaders.train:
            training.step(inputs, target)
        training.end_epoch()
    training.network.eval()
    return training


@torch.no_grad()
def outputs_of(training: Training, part: str = "test") -> tuple[Outputs, torch.Tensor]:
    batches = getattr(training.setup.loaders, part)
    return training.outputs(training.network.encode(batches.inputs)), batches.target


def seen_by(training: Training) -> Seen:
    return Seen(training, *outputs_of(training, "train"), *outputs_of(training, "validation"))


def accuracy(training: Training) -> float:
    outputs, target = outputs_of(training)
    return float((outputs.fused.argmax(dim=1) == target).float().mean())


@pytest.mark.parametrize("name", TRAININGS)
def test_every_training_learns_and_resumes_its_predictions(name):
    training = trained(TRAININGS[name](setup()))
    assert accuracy(training) > 0.8
    twin = TRAININGS[name](setup())
    assert accuracy(twin) != accuracy(training)
    twin.load_state_dict(training.state_dict())
    twin.network.eval()
    (one, _), (two, _) = outputs_of(training), outputs_of(twin)
    assert torch.equal(one.fused, two.fused)
    for modality in "ab":
        assert torch.equal(one.unimodal[modality], two.unimodal[modality])


def test_joint_training_is_the_plain_loop():
    training = trained(TRAININGS["joint"](setup()))
    plain = setup()
    for _ in range(3):
        for inputs, target in plain.loaders.train:
            network = plain.network
            loss = cross_entropy(network.fuse(network.encode(inputs)), target)
            plain.optimizer.zero_grad()
            loss.backward()
            plain.optimizer.step()
    ours, theirs = training.network.state_dict(), plain.network.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def gradients(name: str) -> dict[str, torch.Tensor | None]:
    training = TRAININGS[name](setup())
    inputs, target = next(iter(training.setup.loaders.train))
    training.step(inputs, target)
    return {key: each.grad for key, each in training.network.named_parameters()}


def test_heads_learn_where_the_row_says_so():
    for name in ("joint", "ogm", "ogm-ge"):
        assert gradients(name)["heads.a.weight"] is None
    for name in ("unimodal", "independent", "shuffle"):
        assert gradients(name)["heads.a.weight"].abs().sum() > 0


def test_the_fusion_teaches_independent_encoders_nothing():
    network = setup().network
    inputs, target = next(iter(setup().loaders.train))
    head = network.unimodal(network.encode(inputs))["a"]
    weight = network.get_parameter("model.encoders.a.weight")
    (expected,) = torch.autograd.grad(cross_entropy(head, target), weight)
    found = gradients("independent")
    torch.testing.assert_close(found["model.encoders.a.weight"], expected)
    assert found["model.head.weight"].abs().sum() > 0
    assert not torch.equal(gradients("unimodal")["model.encoders.a.weight"], expected)


def test_the_shuffle_acts_after_the_epochs_that_choose_the_anchor():
    training: Any = TRAININGS["shuffle"](setup(epochs=3))
    chosen = []
    for _ in range(3):
        for inputs, target in training.setup.loaders.train:
            training.step(inputs, target)
            chosen.append(training.shuffle.anchor)
            shuffled = training.shuffle.last.shuffled.sum() > 0
            assert shuffled == (training.shuffle.anchor is not None)
        training.end_epoch()
    assert chosen[:6] == [None] * 6
    assert set(chosen[6:]) <= {"a", "b"}


def test_predictions_of_heads():
    training = trained(TRAININGS["blending"](setup()))
    with torch.no_grad():
        seen = seen_by(training)
        outputs = seen.validation
        scores = {name: make(seen)(outputs) for name, make in PREDICTIONS.items()}
        a, b = (outputs.unimodal[name].softmax(dim=1) for name in "ab")
        assert torch.equal(scores["fused"], outputs.fused)
        torch.testing.assert_close(scores["mean"], (a + b) / 2)
        torch.testing.assert_close(scores["product"].exp(), a * b)
        torch.testing.assert_close(told(training, outputs, "a").exp(), b)
        for each in scores.values():
            assert (each.argmax(dim=1) == seen.validation_target).float().mean() > 0.8


def test_the_hard_gate_sees_16_inputs_at_a_time():
    training = trained(TRAININGS["unimodal"](setup()))
    test = data(60, 2)
    test.inputs["a"][16:32] = 50.0  # one batch is broken
    with torch.no_grad():
        outputs = training.outputs(training.network.encode(test.inputs))
        scores = PREDICTIONS["gate16"](seen_by(training))(outputs)
        b = outputs.unimodal["b"].log_softmax(dim=1)
        torch.testing.assert_close(scores[16:32], b[16:32])
        assert not torch.allclose(scores[:16], b[:16])


def test_told_without_heads_mutes_the_features():
    training = trained(TRAININGS["joint"](setup()))
    outputs, _ = outputs_of(training)
    head = training.network.head
    with torch.no_grad():
        expected = outputs.features["b"] @ head.weight[:, FEATURES:].T + head.bias
        torch.testing.assert_close(told(training, outputs, "a"), expected)


class Gated(LateFusion):
    head = None

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.encoders = nn.ModuleDict({name: nn.Linear(6, FEATURES) for name in "ab"})
        self.last = nn.Linear(FEATURES, CLASSES)

    def fuse(self, features):
        return self.last(features["a"] * features["b"].sigmoid())


def test_a_fusion_of_another_kind_is_muted_for_the_shares():
    model = Gated()
    network = Network(model, data(30, 0))
    features = network.encode(data(30, 0).inputs)
    shares = network.shares(features)
    expected = model.last(features["a"] * 0.5)
    torch.testing.assert_close(shares["a"], expected)


def test_signal_encoders_see_windows():
    encoder = signal_encoder(3).eval()
    x = torch.randn(2, 100, 3)
    moved = x.clone()
    moved[:, 20:40], moved[:, 40:60] = x[:, 40:60], x[:, 20:40]
    assert encoder(x).shape == (2, FEATURES)
    torch.testing.assert_close(encoder(moved), encoder(x))  # a mean over windows of 20
    moved[:, 0:5] = x[:, 1:6]
    assert not torch.allclose(encoder(moved), encoder(x))


LABELS = torch.zeros(4, dtype=torch.int64)


def test_a_user_s_module_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "task.py"
    path.write_text("def model(): return 3\n")
    with pytest.raises(TypeError, match=r"compare: .* must define model and loaders"):
        load_task(str(path), "")
    (tmp_path / "neighbour.py").write_text("from examples.compare_task import loaders, model\n")
    (tmp_path / "good.py").write_text("from neighbour import loaders, model\n")
    task: Any = load_task(str(tmp_path / "good.py"), "")
    assert setting(task, 0)[0].names == ("vibration", "sound")
    task.model = lambda: 3
    with pytest.raises(TypeError, match=r"compare: model must be an nn\.Module"):
        setting(task, 0)
    task.model = lambda: LateFusion({name: nn.Linear(1, 2) for name in "ab"}, CLASSES)
    with pytest.raises(ValueError, match=r"compare: train must give .* none for \['a', 'b'\]"):
        setting(task, 0)
    task.loaders = lambda seed: 3 * [[({name: torch.ones(4, 5, 1) for name in "ab"}, LABELS)]]
    with pytest.raises(ValueError, match=r"the encoder of 'a' must give features \[B, D\]"):
        setting(task, 0)
