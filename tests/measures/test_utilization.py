"""`conditional_utilization` on models whose rates are known beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mmbal_fast import conditional_utilization
from mmbal_fast.nn import MMTM


class Listener(nn.Module):
    """Branch 0 classifies by its own input; branch 1's two gates repeat what branch 0 sees.

    Both inputs are ``[B, 2]``. With equal gates branch 1 predicts by its own input too.
    """

    def __init__(self, *, others: int = 0, returns: Callable[[list[Tensor]], Any] = list) -> None:
        super().__init__()
        self.mmtm = MMTM([2] * (2 + others), ratio=1)
        for parameter in self.mmtm.parameters():
            nn.init.zeros_(parameter)
        with torch.no_grad():
            self.mmtm.squeeze.weight[:2, :2] = torch.eye(2)
            listening: Any = self.mmtm.gates[1]
            listening.weight[:, :2] = 10 * torch.eye(2)
            listening.bias.fill_(-5.0)
        self.returns = returns

    def forward(self, *inputs: Tensor) -> Any:
        return self.returns(list(self.mmtm(*inputs)))


def one_hot(labels: list[int]) -> Tensor:
    return nn.functional.one_hot(torch.tensor(labels), 2).float()


def loader(image: list[int], audio: Tensor, labels: list[int], *more: Tensor) -> list[Any]:
    """Batches of 3 and the rest."""
    data = TensorDataset(one_hot(image), audio, *more, torch.tensor(labels))
    return list(DataLoader(data, batch_size=3))


LABELS = [0, 1, 0, 1, 0, 1, 0, 1]
EQUAL = torch.ones(8, 2)


def test_rate_of_a_branch_that_the_other_lives_on() -> None:
    # Audio knows nothing: right with the image's help, else always class 0.
    table = conditional_utilization(Listener(), loader(LABELS, EQUAL, LABELS))
    assert table.accuracy.tolist() == [1, 1]
    assert table.u[0, 1] == 0.5
    assert table.u[1, 0] == 0  # exactly: branch 0 ignores branch 1
    assert table.u.diagonal().isnan().all()
    assert table.accuracy_without[0, 1] == 0.5
    assert table.d_util == -0.5


def test_negative_rates_are_reported_as_they_are() -> None:
    # Audio is right on its own, and misled by an image that is wrong 3 times of 4.
    image = [0, 1, 1, 0, 1, 0, 1, 0]
    audio = 0.6 * one_hot(LABELS) + 0.4 * one_hot([1 - y for y in LABELS])
    table = conditional_utilization(Listener(), loader(image, audio, LABELS))
    assert table.accuracy.tolist() == [0.25, 0.25]
    assert table.u[0, 1] == -3
    assert table.d_util == 3


def test_means_are_of_the_training_set() -> None:
    # Three of four training images show class 1, so that audio guesses 1 without them.
    training = loader([1, 1, 1, 0, 1, 1, 1, 0], EQUAL, LABELS)
    labels = [0, 0, 0, 1, 0, 0, 0, 1]
    testing = loader(labels, EQUAL, labels)
    found = conditional_utilization(Listener(), testing, train_loader=training)
    assert found.u[0, 1] == 0.75
    assert conditional_utilization(Listener(), testing).u[0, 1] == 0.25


def test_ignored_labels_do_not_count() -> None:
    labels = [*LABELS[:4], -100, -100, -100, -100]
    table = conditional_utilization(Listener(), loader(LABELS, EQUAL, labels))
    assert table.accuracy.tolist() == [1, 1]
    assert table.u[0, 1] == 0.5
    labels = [*LABELS[:4], 7, 7, 7, 7]
    other = conditional_utilization(Listener(), loader(LABELS, EQUAL, labels), ignore_index=7)
    assert torch.equal(other.accuracy, table.accuracy)


def test_three_branches() -> None:
    batches = loader(LABELS, EQUAL, LABELS, torch.ones(8, 2))
    table = conditional_utilization(Listener(others=1), batches)
    assert table.accuracy.tolist() == [1, 1, 0.5]
    expected = torch.zeros(3, 3).double().fill_diagonal_(torch.nan)
    expected[0, 1] = 0.5
    torch.testing.assert_close(table.u, expected, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=r"two branches \(got 3\)"):
        _ = table.d_util
    assert "d_util" not in str(table)


def test_maps_of_logits() -> None:
    class Segments(Listener):
        def forward(self, *inputs: Tensor) -> Any:
            return [each.unsqueeze(2).expand(-1, -1, 5) for each in self.mmtm(*inputs)]

    batches = [(x, y, t.unsqueeze(1).expand(-1, 5)) for x, y, t in loader(LABELS, EQUAL, LABELS)]
    table = conditional_utilization(Segments(), batches)
    assert table.u[0, 1] == 0.5


def test_names_come_from_the_logits() -> None:
    model = Listener(returns=lambda out: dict(zip(["image", "audio"], out, strict=True)))
    table = conditional_utilization(model, loader(LABELS, EQUAL, LABELS))
    assert table.names == ("image", "audio")
    assert table.rate("image", given="audio") == 0.5
    with pytest.raises(ValueError, match=r"one of \['image', 'audio'\] \(got video\)"):
        table.rate("video", given="audio")


def test_names_order_the_logits() -> None:
    model = Listener(returns=lambda out: {"audio": out[1], "image": out[0]})
    batches = loader(LABELS, EQUAL, LABELS)
    table = conditional_utilization(model, batches, names=["image", "audio"])
    assert table.rate("image", given="audio") == 0.5
    plain = conditional_utilization(Listener(), batches)
    assert plain.names == ("branch 0", "branch 1")


def test_forward_adapts_other_models() -> None:
    model = Listener(returns=lambda out: (sum(out), out))
    batches = [{"x": x, "y": y, "label": t} for x, y, t in loader(LABELS, EQUAL, LABELS)]

    def forward(batch: Any) -> Any:
        return model(batch["x"], batch["y"])[1], batch["label"]

    assert conditional_utilization(model, batches, forward=forward).u[0, 1] == 0.5


def test_prints_a_table() -> None:
    model = Listener(returns=lambda out: dict(zip(["image", "audio"], out, strict=True)))
    table = conditional_utilization(model, loader(LABELS, EQUAL, LABELS))
    lines = str(table).splitlines()
    assert lines[0].split() == ["image", "audio"]
    assert lines[1].split() == ["accuracy", "1.0000", "1.0000"]
    assert lines[2].split() == ["u(image", "|", ".)", "-", "0.5000"]
    assert lines[3].split() == ["u(audio", "|", ".)", "0.0000", "-"]
    assert lines[4] == "d_util = u(audio | image) - u(image | audio) = -0.5000"
    assert len({len(line) for line in lines[:4]}) == 1


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    batches = loader(LABELS, EQUAL, LABELS)
    conditional_utilization(Listener(), batches, progress=True)
    shown = capsys.readouterr()
    assert "squeezed means" in shown.err
    assert "utilization" in shown.err
    assert "100%" in shown.err
    conditional_utilization(Listener(), batches)  # standard error is no terminal here
    shown = capsys.readouterr()
    assert not shown.err + shown.out


class Restless(Listener):
    """Has all the state that a measurement might disturb."""

    calls: Tensor
    hidden: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout()
        self.frozen = nn.BatchNorm1d(2).eval()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("hidden", torch.zeros(()), persistent=False)

    def forward(self, *inputs: Tensor) -> Any:
        self.calls += 1
        self.hidden = self.hidden + 1
        image, audio = inputs
        return super().forward(self.drop(self.norm(image)), self.frozen(audio))


def state(model: nn.Module) -> list[Any]:
    return [
        [each.clone() for each in [*model.buffers(), *model.parameters()]],
        [m.average_gate.clone() for m in model.modules() if isinstance(m, MMTM)],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        [module.training for module in model.modules()],
        [torch.get_rng_state()],
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_the_model_as_it_was(fails: bool) -> None:
    model = Restless()
    data = TensorDataset(one_hot(LABELS), EQUAL, torch.tensor(LABELS))
    shuffled = DataLoader(data, batch_size=3, shuffle=True)
    x, y, _ = next(iter(shuffled))
    sum(each.sum() for each in model(x, y)).backward()
    model.mmtm.set_mode("average_gate", 1)
    model.mmtm.process_group = "a group"  # type: ignore[assignment]  # fails if it is used
    before = state(model)

    def forward(batch: Any) -> Any:
        assert not model.drop.training
        assert not torch.is_grad_enabled()
        if fails and model.mmtm.num_samples == 8:
            raise ArithmeticError
        return model(*batch[:-1]), batch[-1]

    if fails:
        with pytest.raises(ArithmeticError):
            conditional_utilization(model, shuffled, forward=forward)
    else:
        conditional_utilization(model, shuffled, forward=forward)
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)
    assert str(model.mmtm.process_group) == "a group"


def test_measures_what_evaluation_uses() -> None:
    # Open windows, old averages and dropout play no part.
    model = Restless()
    batches = loader(LABELS, EQUAL, LABELS)
    clean = conditional_utilization(copy.deepcopy(model), batches)
    model.mmtm.running_squeeze.fill_(9.0)
    model.mmtm.num_samples.fill_(100)
    model.mmtm.set_mode("isolated")
    assert torch.equal(conditional_utilization(model, batches).accuracy, clean.accuracy)
    assert clean.u[0, 1] == 0.5


def test_a_branch_that_is_never_right_has_no_rate() -> None:
    wrong = [1 - y for y in LABELS]
    table = conditional_utilization(Listener(), loader(wrong, EQUAL, LABELS))
    assert table.accuracy.tolist() == [0, 0]
    assert table.u.isnan()[1, 0]
    assert table.u[0, 1] == -torch.inf


class Idle(Listener):
    def forward(self, *inputs: Tensor) -> Any:
        return list(inputs)


GOOD = loader(LABELS, EQUAL, LABELS)


@pytest.mark.parametrize(
    ("model", "batches", "options", "error", "message"),
    [
        (nn.Linear(2, 2), GOOD, {}, ValueError, r"must contain an mmbal_fast.nn.MMTM"),
        (Idle(), GOOD, {}, ValueError, r"every MMTM must run"),
        (Listener(), [], {}, ValueError, r"give samples"),
        (Listener(), iter(GOOD), {}, ValueError, r"labelled samples \(got none\)"),
        (Listener(), loader(LABELS, EQUAL, [-100] * 8), {}, ValueError, r"labelled samples"),
        (Listener(), GOOD, {"names": ["a"]}, ValueError, r"2 branches \(got \['a'\]\)"),
        (Listener(returns=lambda o: o[0]), GOOD, {}, TypeError, r"\(got Tensor\)"),
        (Listener(returns=lambda o: o[:1]), GOOD, {}, ValueError, r"2 branches \(got 1\)"),
        (Listener(returns=lambda o: (o[0], o)), GOOD, {}, TypeError, r"got list for branch 1"),
        (
            Listener(returns=lambda o: {"a": o[0], "b": o[1]}),
            GOOD,
            {"names": ["a", "c"]},
            ValueError,
            r"named \['a', 'c'\] \(got \['a', 'b'\]\)",
        ),
        (Listener(), [{"x": EQUAL}], {}, TypeError, r"a batch must be .*\(got dict\)"),
        (Listener(), [(EQUAL, EQUAL, EQUAL)], {}, TypeError, r"integers \(got torch.float32\)"),
        (
            Listener(),
            [(EQUAL, EQUAL, torch.zeros(8, 2).long())],
            {},
            ValueError,
            r"got \[8, 2\] for \[8, 2\]",
        ),
    ],
)
def test_refuses(
    model: nn.Module, batches: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        conditional_utilization(model, batches, **options)
