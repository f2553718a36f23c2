"""The typicality gate against its formulas, and what it can and cannot see."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from mmbal_fast.fusion import TypicalityGate
from mmbal_fast.fusion.typicality_gate import Mode

WIDTHS = {"audio": 4, "image": 7, "text": 2}
CLASSES = 3
MODES: list[Mode] = ["soft", "hard"]

Features = dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Batches of 16 gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sample(count: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Features, Tensor]:
    """Correlated Gaussian features of each modality about their classes' means, and labels."""
    truth, own = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    target = torch.arange(count) % CLASSES
    features = {}
    for name, width in WIDTHS.items():
        means = 3 * torch.randn(CLASSES, width, generator=truth, dtype=torch.float64)
        mixing = torch.randn(width, width, generator=truth, dtype=torch.float64)
        noise = torch.randn(count, width, generator=own, dtype=torch.float64)
        features[name] = (means[target] + noise @ mixing).to(dtype)
    return features, target


def some_logits(count: int, dtype: torch.dtype = torch.float64) -> Features:
    generator = torch.Generator().manual_seed(11)
    return {
        name: 3 * torch.randn(count, CLASSES, generator=generator, dtype=torch.float64).to(dtype)
        for name in WIDTHS
    }


def batches(
    features: Features, target: Tensor, sizes: list[int] | int
) -> list[tuple[Features, Tensor]]:
    pieces = {name: each.split(sizes) for name, each in features.items()}
    return [
        ({name: each[i] for name, each in pieces.items()}, part)
        for i, part in enumerate(target.split(sizes))
    ]


@pytest.fixture
def gate() -> TypicalityGate:
    return TypicalityGate(WIDTHS, CLASSES).fit([sample(60, 0)], [sample(40, 1)[0]])


def by_hand(
    test: Features, logits: Features, mode: str, shrinkage: float = 0.1, threshold: float = -3.0
) -> np.ndarray:
    """The formulas of the docstring, literally, with the same data as the fixture."""
    (train, y), (held_out, _) = sample(60, 0), sample(40, 1)
    log_q, p = {}, {}
    for m in WIDTHS:
        z, y_ = train[m].numpy(), y.numpy()
        mu = np.stack([z[y_ == c].mean(axis=0) for c in range(CLASSES)])
        s = np.stack([np.outer(row, row) for row in z - mu[y_]]).mean(axis=0)
        s = (1 - shrinkage) * s + shrinkage * np.diag(s).mean() * np.eye(len(s))
        inverse = np.linalg.inv(s)

        def distance(x: Tensor, mu: np.ndarray = mu, inverse: np.ndarray = inverse) -> np.ndarray:
            return np.array([min((z - c) @ inverse @ (z - c) for c in mu) for z in x.numpy()])

        log_d = np.log(distance(held_out[m]))
        a, deviation = log_d.mean(), log_d.std(ddof=1)
        q = 1 - scipy.stats.norm.cdf((np.log(distance(test[m])) - a) / deviation)
        log_q[m] = np.log(np.maximum(q, 1e-12))
        exp = np.exp(logits[m].numpy())
        p[m] = exp / exp.sum(axis=1, keepdims=True)
    if mode == "soft":
        q = {m: np.exp(log_q[m]) for m in WIDTHS}
        largest = np.max(list(q.values()), axis=0)
        total = sum((q[m] / largest)[:, None] * p[m] for m in WIDTHS)
        return np.log(total / total.sum(axis=1, keepdims=True))
    best = max(WIDTHS, key=lambda m: log_q[m].mean())
    kept = [m for m in WIDTHS if log_q[m].mean() > threshold or m == best]
    product = np.prod([p[m] for m in kept], axis=0)
    return np.log(product / product.sum(axis=1, keepdims=True))


def shifted(count: int = 20) -> Features:
    test, _ = sample(count, 2)
    test["image"] = test["image"] + 6.0
    test["text"][::2] *= 3.0
    return test


@pytest.mark.parametrize("mode", MODES)
def test_formulas(gate: TypicalityGate, mode: Mode) -> None:
    gate.mode = mode
    test, logits = shifted(), some_logits(20)
    expected = by_hand(test, logits, mode)
    np.testing.assert_allclose(gate(test, logits).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert gate.weights(test).amin() < 0.01  # the case is one in which the gate does something


@pytest.mark.parametrize(
    ("mode", "default", "other"),
    [
        ("soft", {"shrinkage": 0.1}, {"shrinkage": 0.7}),
        ("hard", {"threshold": -3.0}, {"threshold": -0.5}),
    ],
)
def test_settings_reach_the_formulas(mode: Mode, default: dict, other: dict) -> None:
    test, logits = sample(20, 2)[0], some_logits(20)
    gate = TypicalityGate(WIDTHS, CLASSES, mode=mode, **other)
    gate.fit([sample(60, 0)], [sample(40, 1)[0]])
    expected = by_hand(test, logits, mode, **other)
    np.testing.assert_allclose(gate(test, logits).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - by_hand(test, logits, mode, **default)).max() > 0.01


def test_hard_keeps_the_most_typical_if_none_is_typical(gate: TypicalityGate) -> None:
    gate.mode = "hard"
    test = {name: each + 50.0 for name, each in sample(12, 2)[0].items()}
    test["image"] = sample(12, 2)[0]["image"] * 5.0
    log_q = gate.typicality(test).mean(dim=0)
    assert (log_q < gate.threshold).all()
    assert gate.weights(test).unique(dim=0).tolist() == [(log_q == log_q.max()).double().tolist()]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_any_batches_give_what_one_gives(offset: float) -> None:
    (train, target), (held_out, other) = sample(60, 0), sample(40, 1)
    for each in (train, held_out):
        each["image"] += offset
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    mixed = {name: each[order] for name, each in train.items()}
    one = TypicalityGate(WIDTHS, CLASSES).fit([(train, target)], [held_out])
    many = TypicalityGate(WIDTHS, CLASSES).fit(
        batches(mixed, target[order], [1, 0, 30, 29]), batches(held_out, other, [3, 0, 37])
    )
    for name, expected in one.state_dict().items():
        torch.testing.assert_close(many.state_dict()[name], expected, rtol=1e-6, atol=1e-6)


def test_features_far_from_zero_do_not_cancel(gate: TypicalityGate) -> None:
    (train, target), (held_out, _), (test, _) = sample(60, 0), sample(40, 1), sample(20, 2)
    far = TypicalityGate(WIDTHS, CLASSES).fit(
        [({name: each + 1e4 for name, each in train.items()}, target)],
        [{name: each + 1e4 for name, each in held_out.items()}],
    )
    moved = {name: each + 1e4 for name, each in test.items()}
    torch.testing.assert_close(far.typicality(moved), gate.typicality(test), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_computes_in_float32(
    gate: TypicalityGate, mode: Mode, dtype: torch.dtype
) -> None:
    gate.mode = mode
    test = {name: each.to(dtype) for name, each in shifted().items()}
    logits = some_logits(20, dtype)
    wide = gate({n: z.float() for n, z in test.items()}, {n: x.float() for n, x in logits.items()})
    assert wide.dtype == torch.float32
    assert torch.equal(gate(test, logits), wide)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(test, logits), wide)
    assert torch.equal(copy.deepcopy(gate).to(dtype)(test, logits), wide)


def test_it_moves_to_double_precision_and_back(gate: TypicalityGate) -> None:
    expected = gate.typicality(shifted())
    gate.double()
    assert {each.dtype for each in gate.buffers()} == {torch.float64}
    torch.testing.assert_close(gate.typicality(shifted()), expected, rtol=1e-6, atol=1e-6)
    gate.float()
    assert {each.dtype for each in gate.buffers()} == {torch.float32}


def test_state_dict(gate: TypicalityGate) -> None:
    test, logits = shifted(), some_logits(20)
    other = TypicalityGate(WIDTHS, CLASSES)
    with pytest.raises(RuntimeError, match="TypicalityGate: must be fitted or loaded first"):
        other(test, logits)
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other(test, logits), gate(test, logits))
    other.load_state_dict(TypicalityGate(WIDTHS, CLASSES).state_dict())
    with pytest.raises(RuntimeError, match="must be fitted"):
        other(test, logits)
    renamed = TypicalityGate({"a" if n == "audio" else n: w for n, w in WIDTHS.items()}, CLASSES)
    with pytest.raises(RuntimeError, match=r"typical.a.center"):
        renamed.load_state_dict(gate.state_dict())
    with torch.device("meta"):
        empty = TypicalityGate(WIDTHS, CLASSES)
    empty.load_state_dict(gate.state_dict(), assign=True)
    assert torch.equal(empty(test, logits), gate(test, logits))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda gate: pickle.loads(pickle.dumps(gate))])
def test_copies(gate: TypicalityGate, twin: Callable[[TypicalityGate], TypicalityGate]) -> None:
    gate.mode = "hard"
    test, logits = shifted(), some_logits(20)
    assert torch.equal(twin(gate)(test, logits), gate(test, logits))


@pytest.mark.parametrize("mode", MODES)
def test_export_for_any_batch_size(gate: TypicalityGate, mode: Mode) -> None:
    gate.mode = mode
    batch = torch.export.Dim("batch", min=2)
    shapes = {name: {0: batch} for name in WIDTHS}
    program = torch.export.export(
        gate, (shifted(20), some_logits(20)), dynamic_shapes=(shapes, shapes)
    )
    test, logits = shifted(9), some_logits(9)
    torch.testing.assert_close(program.module()(test, logits), gate(test, logits))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("missing", [None, "text"])
def test_compiles_in_one_graph(gate: TypicalityGate, mode: Mode, missing: str | None) -> None:
    gate.mode = mode
    test, logits = shifted(), some_logits(20)
    if missing:
        test[missing] = logits[missing] = None
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(test, logits), gate(test, logits))


@pytest.mark.parametrize("mode", MODES)
def test_a_missing_modality_has_no_say(gate: TypicalityGate, mode: Mode) -> None:
    gate.mode = mode
    test, logits = shifted(), some_logits(20)
    test["audio"] = logits["audio"] = None
    assert (gate.weights(test)[:, 0] == 0).all()

    rest = {name: width for name, width in WIDTHS.items() if name != "audio"}
    (train, target), (held_out, _) = sample(60, 0), sample(40, 1)
    without = TypicalityGate(rest, CLASSES, mode=mode).fit(
        [({name: train[name] for name in rest}, target)], [{name: held_out[name] for name in rest}]
    )
    expected = without({n: test[n] for n in rest}, {n: logits[n] for n in rest})
    torch.testing.assert_close(gate(test, logits), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_a_missing_one(
    gate: TypicalityGate, mode: Mode, value: float
) -> None:
    gate.mode = mode
    test, logits = sample(20, 2)[0], some_logits(20)
    complete = gate(test, logits)
    broken = {name: each.clone() for name, each in test.items()}
    broken["audio"][3, 1] = value
    wrong = {name: each.clone() for name, each in logits.items()}
    wrong["audio"][3] = float("nan")
    result = gate(broken, wrong)

    alone = gate(
        {name: None if name == "audio" else each[3:4] for name, each in test.items()},
        {name: None if name == "audio" else each[3:4] for name, each in logits.items()},
    )
    torch.testing.assert_close(result[3:4], alone)
    others = torch.arange(20) != 3
    torch.testing.assert_close(result[others], complete[others])


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_without_any_modality_predicts_nan(gate: TypicalityGate, mode: Mode) -> None:
    gate.mode = mode
    test, logits = sample(20, 2)[0], some_logits(20)
    for each in test.values():
        each[5] = float("nan")
    result = gate(test, logits)
    assert result.isnan().any(dim=1).nonzero().flatten().tolist() == [5]
    assert result[5].isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_log_probabilities(gate: TypicalityGate, mode: Mode) -> None:
    gate.mode = mode
    total = gate(shifted(), some_logits(20)).exp().sum(dim=1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_encode_runs_in_evaluation_mode_and_is_left_as_it_was() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout()

        def features(self, inputs: Mapping[str, Tensor]) -> Features:
            return {name: self.dropout(each) for name, each in inputs.items()}

    model = Model()
    train, held_out = sample(60, 0), sample(40, 1)
    fitted = TypicalityGate(WIDTHS, CLASSES).fit([train], [held_out], encode=model.features)
    plain = TypicalityGate(WIDTHS, CLASSES).fit([train], [held_out[0]])
    assert model.training
    assert model.dropout.training
    for name, value in plain.state_dict().items():
        assert torch.equal(fitted.state_dict()[name], value)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    TypicalityGate(WIDTHS, CLASSES).fit([sample(60, 0)], [sample(40, 1)], progress=True)
    shown = capsys.readouterr().err
    assert "training features" in shown
    assert "held-out features" in shown
    TypicalityGate(WIDTHS, CLASSES).fit([sample(60, 0)], [sample(40, 1)])
    assert capsys.readouterr().err == ""


# ---- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"audio": 3}, 2), r"widths must name at least 2 modalities \(got \['audio'\]\)"),
        (({"audio": 3, "image": 0}, 2), r"widths must be from 1 on"),
        ((WIDTHS, 1), r"num_classes must be at least 2 \(got 1\)"),
        ((WIDTHS, 2, {"mode": "firm"}), r"mode must be 'soft' or 'hard' \(got 'firm'\)"),
        ((WIDTHS, 2, {"shrinkage": 1.5}), r"shrinkage must be from 0 to 1 \(got 1.5\)"),
        ((WIDTHS, 2, {"threshold": 0.0}), r"threshold must be below 0 \(got 0.0\)"),
    ],
)
def test_bad_settings(arguments: tuple, message: str) -> None:
    *positional, named = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=f"TypicalityGate: {message}"):
        TypicalityGate(*positional, **named)


def nan_in_image(batch: tuple[Features, Tensor]) -> tuple[Features, Tensor]:
    batch[0]["image"][4:6] = float("nan")
    return batch


TRAIN, HELD_OUT = sample(60, 0), sample(40, 1)
BAD_DATA: dict[str, tuple[list[Any], list[Any], type[Exception], str]] = {
    "fewer samples than classes": (
        batches(*sample(2, 0), [2]),
        [HELD_OUT],
        ValueError,
        r"as many samples as classes, 3 \(got 2\)",
    ),
    "no training data": ([], [HELD_OUT], ValueError, r"as classes, 3 \(got 0\)"),
    "a class never seen": (
        [(TRAIN[0], TRAIN[1] % 2)],
        [HELD_OUT],
        ValueError,
        r"must hold every class \(got no sample of \[2\]\)",
    ),
    "NaN in training": (
        [nan_in_image(sample(60, 0))],
        [HELD_OUT],
        ValueError,
        r"features of 'image' must be finite \(got NaN or inf in 2 of 60 samples\)",
    ),
    "NaN held out": (
        [TRAIN],
        [nan_in_image(sample(40, 1))],
        ValueError,
        r"features of 'image' must be finite \(got NaN or inf in 2 of 40 samples\)",
    ),
    "nothing held out": ([TRAIN], [], ValueError, r"held_out must hold at least 2 .*\(got 0\)"),
    "one held out": (
        [TRAIN],
        batches(*sample(1, 1), [1]),
        ValueError,
        r"held_out must hold at least 2 inputs \(got 1\)",
    ),
    "label too large": (
        [(TRAIN[0], TRAIN[1] + 1)],
        [HELD_OUT],
        ValueError,
        r"target must be from 0 to 2 \(got 1 to 3\)",
    ),
    "label negative": (
        [(TRAIN[0], TRAIN[1] - 1)],
        [HELD_OUT],
        ValueError,
        r"target must be from 0 to 2 \(got -1 to 1\)",
    ),
    "soft labels": (
        [(TRAIN[0], TRAIN[1].float())],
        [HELD_OUT],
        TypeError,
        r"target must be a tensor of integer labels \(got torch.float32\)",
    ),
    "labels of another length": (
        [(TRAIN[0], TRAIN[1][:9])],
        [HELD_OUT],
        ValueError,
        r"target must be \[60\], a label for each sample \(got \[9\]\)",
    ),
    "no target": ([TRAIN[0]], [HELD_OUT], TypeError, r"\(inputs, target\) \(got dict\)"),
    "a modality missing": (
        [(TRAIN[0] | {"text": None}, TRAIN[1])],
        [HELD_OUT],
        ValueError,
        r"every modality must be there \(got None for 'text'\)",
    ),
    "another name": (
        [({"audio": TRAIN[0]["audio"]}, TRAIN[1])],
        [HELD_OUT],
        ValueError,
        r"must be given for .*\(got \['audio'\]\)",
    ),
    "another width": (
        [(TRAIN[0] | {"text": TRAIN[0]["audio"]}, TRAIN[1])],
        [HELD_OUT],
        ValueError,
        r"features of 'text' must be \[B, 2\].*\(got \[60, 4\]\)",
    ),
    "constant features": (
        [(TRAIN[0] | {"text": torch.ones(60, 2)}, TRAIN[1])],
        [HELD_OUT],
        ValueError,
        r"features of 'text' must vary within the classes.*rank 0 of 2",
    ),
    "constant features held out": (
        [TRAIN],
        [HELD_OUT[0] | {"text": torch.ones(40, 2)}],
        ValueError,
        r"inputs of 'text' must differ .*\(got one distance for all 40\)",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_changes_nothing(gate: TypicalityGate, case: str) -> None:
    train, held_out, error, message = BAD_DATA[case]
    before = copy.deepcopy(gate.state_dict())
    with pytest.raises(error, match=f"TypicalityGate.fit: .*{message}"):
        gate.fit(train, held_out)
    for name, value in gate.state_dict().items():
        assert torch.equal(value, before[name])


def without(features: Features, *names: str) -> dict[str, Tensor | None]:
    return {name: None if name in names else each for name, each in features.items()}


@pytest.mark.parametrize(
    ("features", "logits", "error", "message"),
    [
        ([1], some_logits(20), TypeError, r"features must be a mapping .*\(got list\)"),
        (shifted(), [1], TypeError, r"logits must be a mapping .*\(got list\)"),
        ({}, some_logits(20), ValueError, r"features must be given for .*\(got \[\]\)"),
        (shifted(), {}, ValueError, r"logits must be given for .*\(got \[\]\)"),
        (without(shifted(), *WIDTHS), some_logits(20), ValueError, r"one modality at least"),
        (shifted(), without(some_logits(20), *WIDTHS), ValueError, r"hold at least one tensor"),
        (without(shifted(), "text"), some_logits(20), ValueError, r"only one of them for 'text'"),
        (shifted(), some_logits(19), ValueError, r"logits must be .*\[20, 3\] \(got \[19, 3\]\)"),
        (
            shifted() | {"text": torch.zeros(19, 2)},
            some_logits(20),
            ValueError,
            r"'text' must be \[B, 2\].*\(got \[19, 2\]\)",
        ),
        (
            shifted() | {"text": torch.zeros(20, 2).int()},
            some_logits(20),
            TypeError,
            r"'text' must be a floating point tensor \(got torch.int32\)",
        ),
    ],
)
def test_bad_input(
    gate: TypicalityGate, features: object, logits: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"TypicalityGate: .*{message}"):
        gate(features, logits)


# ---- what it sees and what it does not --------------------------------------------------------


class Sensors:
    """Three modalities, each seen by 12 features that tell five classes apart fairly well."""

    classes, width, names = 5, 12, ("first", "second", "third")

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.means = {
            name: 0.9 * torch.randn(self.classes, self.width, generator=self.generator)
            for name in self.names
        }

    def sample(self, count: int) -> tuple[Features, Tensor]:
        target = torch.randint(self.classes, (count,), generator=self.generator)
        noise = torch.randn(len(self.names), count, self.width, generator=self.generator)
        return {
            n: self.means[n][target] + e for n, e in zip(self.names, noise, strict=True)
        }, target

    def logits(self, features: Features) -> Features:
        """The best classifier of each modality alone."""
        return {n: -0.5 * torch.cdist(z, self.means[n]).square() for n, z in features.items()}

    def gate(self, mode: Mode) -> TypicalityGate:
        gate = TypicalityGate(dict.fromkeys(self.names, self.width), self.classes, mode=mode)
        return gate.fit([self.sample(1000)], [self.sample(300)[0]])


def accuracy(log_probs: Tensor, target: Tensor) -> float:
    return 100.0 * (log_probs.argmax(dim=1) == target).double().mean().item()


def product(logits: Features) -> Tensor:
    return torch.stack([each.log_softmax(dim=1) for each in logits.values()]).sum(dim=0)


def told(logits: Features, dropped: str) -> Tensor:
    """Product of the predictions of all modalities but one."""
    return product({name: each for name, each in logits.items() if name != dropped})


def in_batches(gate: TypicalityGate, features: Features, logits: Features, size: int) -> Tensor:
    pieces = batches(features, torch.arange(len(next(iter(features.values())))), size)
    return torch.cat([gate(each, {n: x[rows] for n, x in logits.items()}) for each, rows in pieces])


def with_noise(
    sensors: Sensors, noisy: str, features: Features, target: Tensor
) -> tuple[Features, float, float]:
    """Noise of three deviations; accuracy if told so, and if all are trusted."""
    noise = torch.randn(features[noisy].shape, generator=sensors.generator)
    broken = features | {noisy: features[noisy] + 3 * features[noisy].std(dim=0) * noise}
    logits = sensors.logits(broken)
    return broken, accuracy(told(logits, noisy), target), accuracy(product(logits), target)


@pytest.mark.parametrize("noisy", Sensors.names)
@pytest.mark.parametrize("seed", range(3))
def test_noise_of_three_deviations_is_as_good_as_named(noisy: str, seed: int) -> None:
    sensors = Sensors(seed)
    gate = sensors.gate("hard")
    features, target = sensors.sample(2000)
    broken, reference, trusting = with_noise(sensors, noisy, features, target)
    gated = accuracy(in_batches(gate, broken, sensors.logits(broken), 16), target)
    clean = accuracy(in_batches(gate, features, sensors.logits(features), 16), target)
    assert trusting < reference - 10  # the noise does harm
    assert gated > reference - 1
    assert clean > reference  # and without noise all three are used


@pytest.mark.parametrize("noisy", Sensors.names)
def test_soft_sees_the_noise_but_pays_for_weights_that_differ_by_chance(noisy: str) -> None:
    """Among typical modalities ``q`` is uniform, where equal weights would be best."""
    sensors = Sensors(0)
    gate = sensors.gate("soft")
    features, target = sensors.sample(2000)
    broken, reference, trusting = with_noise(sensors, noisy, features, target)
    gated = accuracy(gate(broken, sensors.logits(broken)), target)
    assert gate.weights(broken)[:, sensors.names.index(noisy)].mean() < 0.01
    assert trusting + 10 < gated < reference - 1


@pytest.mark.parametrize("mode", MODES)
def test_a_modality_that_misleads_but_looks_typical_passes(mode: Mode) -> None:
    """The limit of the gate: features that belong to another sample are as typical as any."""
    sensors = Sensors(0)
    gate = sensors.gate(mode)
    features, target = sensors.sample(2000)
    for wrong in ("first", "second"):
        other = torch.randperm(2000, generator=sensors.generator)
        features[wrong] = features[wrong][other]
    logits = sensors.logits(features)
    assert accuracy(logits["third"], target) > 90
    assert accuracy(in_batches(gate, features, logits, 16), target) < 70
