"""What `diagnose` finds on networks whose state is known, and that it leaves them alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmbal_fast import Diagnosis, diagnose
from mmbal_fast.compare import colored_digits
from mmbal_fast.compare._networks import FEATURES, image_encoder
from mmbal_fast.nn import MultiHeadLateFusion

EPOCHS = 15
Batches = list[tuple[dict[str, Tensor], Tensor]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


# ---- on real images: the two cases that matter


def digits() -> tuple[Batches, Batches]:
    """Colored digits; the labels of the validation part go with the colour, too."""

    inputs, label = colored_digits(torch.Generator().manual_seed(4))
    batches = [
        ({name: each[rows] for name, each in inputs.items()}, label[rows])
        for part in torch.arange(1200).split(600)
        for rows in part.split(64)
    ]
    return batches[:10], batches[10:]


def trained(train: Batches, *, balanced: bool) -> MultiHeadLateFusion:
    """Jointly, or with a loss for each modality beside the fused one."""
    torch.manual_seed(4)
    encoders = {"gray": image_encoder(1), "color": image_encoder(3)}
    model = MultiHeadLateFusion(encoders, dict.fromkeys(encoders, FEATURES), 10)
    optimizer = sgd(model.parameters())
    for _ in range(EPOCHS):
        for inputs, target in train:
            logits = model(inputs)
            heads = list(logits) if balanced else ["fused"]
            optimizer.zero_grad()
            torch.stack([cross_entropy(logits[name], target) for name in heads]).sum().backward()
            optimizer.step()
    return model


def test_joint_training_on_colored_digits_left_the_gray_encoder_behind() -> None:
    train, validation = digits()
    found = diagnose(
        trained(train, balanced=False), train, validation, epochs=EPOCHS, optimizer=sgd
    )
    assert found.under_trained == ("gray",)
    gray, color = found.gap.tolist()
    assert gray > 2
    assert abs(color) < 1
    assert found.advice.startswith("gray is under-trained: a linear probe of the gray encoder gets")
    assert f"(gap {gray:.1f} ± {found.gap_error[0]:.1f} points)" in found.advice
    assert "the labels of these data cannot tell" in found.advice
    assert found.share[1] > 0.5  # the colour has most of the logits,
    assert found.shuffled[1] < found.shuffled[0] - 20  # and the network lives on it


def test_nothing_is_wrong_with_a_balanced_network() -> None:
    train, validation = digits()
    found = diagnose(trained(train, balanced=True), train, validation, epochs=EPOCHS, optimizer=sgd)
    assert found.under_trained == ()
    assert found.advice.startswith("Nothing is wrong that these data can show")
    assert "whether a modality misleads elsewhere, their labels cannot tell" in found.advice


# ---- what each number is, on features that are the inputs


class Given(nn.Module):
    """The inputs are the features; the logits are a weighted sum of them."""

    def __init__(self, weights: dict[str, float]) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: nn.Identity() for name in weights})
        self.weights = weights
        self.scale = nn.Parameter(torch.ones(()))

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return self.scale * sum(self.weights[name] * each for name, each in features.items())


def one_hot(count: int = 300, classes: int = 3, shift: float = 0.0) -> Batches:
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(count) % classes
    names = ("audio", "image")
    noise = 0.1 * torch.randn(2, count, classes, generator=generator)
    inputs = {
        name: torch.eye(classes)[target] + each for name, each in zip(names, noise, strict=True)
    }
    inputs["image"] = inputs["image"] + shift
    split = [{name: each[i : i + 70] for name, each in inputs.items()} for i in range(0, count, 70)]
    return list(zip(split, target.split(70), strict=True))


def found_of(model: Any, validation: Batches | None = None, **options: Any) -> Diagnosis:
    settings: dict[str, Any] = {"epochs": 1, "optimizer": sgd} | options
    return diagnose(model, one_hot(), validation or one_hot(), **settings)


def test_share_muted_and_shuffled() -> None:
    found = found_of(Given({"audio": 1.0, "image": 3.0}))
    assert (found.names, found.samples, found.fused) == (("audio", "image"), 300, 100.0)
    torch.testing.assert_close(
        found.share, torch.tensor([0.25, 0.75], dtype=torch.float64), atol=0.01, rtol=0
    )
    assert found.muted.tolist() == [100.0, 100.0]  # either is enough on its own ...
    assert found.shuffled[0] == 100.0
    assert 25 < found.shuffled[1] < 42  # ... but against the image nothing helps: chance
    alone = found_of(Given({"audio": 0.0, "image": 1.0}))
    assert alone.share.tolist() == [0.0, 1.0]
    assert alone.muted[0] == 100.0
    assert alone.muted[1] < 50


def test_gap_and_its_error_are_paired() -> None:
    """An encoder that lost what its twin, which has nothing to learn, keeps."""

    class Poor(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(torch.arange(len(x))[:, None] % 2 == 0, x, torch.zeros_like(x))

    model = Given({"audio": 1.0, "image": 1.0})
    model.encoders["audio"] = Poor()
    found = found_of(model, fresh=lambda name: nn.Identity())
    missed = (100 - found.probe[0]).item() / 100
    assert 0.2 < missed < 0.5
    assert found.alone.tolist() == [100.0, 100.0]
    assert found.gap[0].item() == pytest.approx(100 * missed)
    error = 100 * (missed * (1 - missed) / 299) ** 0.5
    assert found.gap_error[0].item() == pytest.approx(error)
    assert found.gap_error[1] == 0
    assert found.under_trained == ("audio",)


def test_typicality_of_inputs_like_those_of_training_and_of_others() -> None:
    model = Given({"audio": 1.0, "image": 1.0})
    torch.testing.assert_close(
        found_of(model).typicality, torch.full((2,), -1.0, dtype=torch.float64), atol=0.1, rtol=0
    )
    shifted = found_of(model, one_hot(shift=1.0)).typicality
    assert shifted[0] > -1.1
    assert shifted[1] < -10


def test_typicality_of_features_that_do_not_vary_is_not_measured() -> None:
    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    model = Given({"audio": 1.0, "image": 1.0})
    model.encoders["audio"] = Dead()
    found = found_of(model)
    assert found.typicality.isnan().all()
    assert str(found).splitlines()[1].endswith(" -")
    assert found.probe[0] < 40


def test_the_model_and_the_generators_are_left_alone() -> None:
    model = MultiHeadLateFusion(
        {
            "audio": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()),
            "image": nn.Linear(3, 4),
        },
        {"audio": 4, "image": 4},
        3,
    )
    model.encoders["image"].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = found_of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(each.grad is None for each in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    torch.rand(5)  # what was drawn before plays no part
    assert str(found_of(model)) == str(first)
    train, validation = one_hot(), one_hot()
    with torch.inference_mode():
        assert str(diagnose(model, train, validation, epochs=1, optimizer=sgd)) == str(first)


def test_encoders_start_anew_and_train_for_the_epochs() -> None:
    made, steps = [], []

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            steps.append(len(self.param_groups[0]["params"]))
            return super().step(closure)

    def fresh(name: str) -> nn.Module:
        made.append(name)
        return nn.Linear(3, 3)

    model = Given({"audio": 1.0, "image": 1.0})
    found_of(model, epochs=3, fresh=fresh, optimizer=lambda p: Counting(p, lr=0.1))
    assert made == ["audio", "image"]
    assert len(steps) == 2 * 3 * 5  # modalities, epochs, batches
    assert set(steps) == {4}  # weight and bias of the encoder and of the head on it

    same = nn.Linear(3, 3)
    torch.nn.init.zeros_(same.weight)  # features that are constant, unless the weights are reset
    model.encoders["audio"] = same
    found = found_of(model, epochs=1)
    assert found.probe[0] < 40
    assert found.alone[0] > 90


def test_table_and_plot(capsys: pytest.CaptureFixture[str]) -> None:
    found = found_of(Given({"audio": 1.0, "image": 3.0}), progress=True)
    assert "each encoder alone" in capsys.readouterr().err
    table = str(found).splitlines()
    assert table[0].split() == [
        "modality", "probe", "alone", "gap", "share", "muted", "shuffled", "typicality",
    ]  # fmt: skip
    assert table[1].split()[:6] == ["audio", "100.0", "100.0", "+0.0", "±", "0.0"]
    assert table[3] == "fused     100.0   % of 300 samples"
    assert table[4] == found.advice
    assert all(len(line) <= 80 for line in table[:4])
    panels: Any = found.plot().axes
    heights = [patch.get_height() for axes in panels for patch in axes.patches]
    expected = torch.cat([found.probe, found.alone, found.muted, found.shuffled, found.share])
    torch.testing.assert_close(torch.tensor(heights, dtype=torch.float64), expected)


@pytest.mark.parametrize(
    ("gap", "error", "named"),
    [
        ([3.0, 0.0], [1.0, 1.0], ("audio",)),
        ([3.0, 0.0], [1.6, 1.0], ()),  # within two standard errors
        ([0.9, 0.0], [0.1, 1.0], ()),  # too small to speak of
        ([3.0, 5.0], [0.5, 0.5], ("image", "audio")),  # the worst first
        ([3.0, 5.0], [0.5, 4.0], ("audio",)),
    ],
)
def test_what_is_called_under_trained(gap: list, error: list, named: tuple[str, ...]) -> None:
    found = dataclasses.replace(
        found_of(Given({"audio": 1.0, "image": 3.0})),
        gap=torch.tensor(gap),
        gap_error=torch.tensor(error),
    )
    assert found.under_trained == named
    if named:
        assert found.advice.startswith(f"{' and '.join(named)} {'are' if named[1:] else 'is'} und")
        assert f"the {named[0]} encoder gets" in found.advice


# ---- errors


class Bare(nn.Module):
    """An encoder whose weight nobody knows how to reset."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def with_encoder(encoder: nn.Module) -> nn.Module:
    model = Given({"audio": 1.0, "image": 1.0})
    model.encoders["audio"] = encoder
    return model


class Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, None]


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.nan


GOOD = Given({"audio": 1.0, "image": 1.0})


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Linear(2, 2), {}, TypeError, r"model.encoders must be a mapping .*\(got none\)"),
        (GOOD, {"epochs": 0}, ValueError, r"epochs must be at least 1 \(got 0\)"),
        (GOOD, {"validation": [1]}, TypeError, r"val_loader must give \(inputs by modality"),
        (
            GOOD,
            {"validation": [(one_hot()[0][0], one_hot()[0][1] + 1)]},
            ValueError,
            r"val_loader must give labels from 0 to 2, one for each logit \(got 1 to 3\)",
        ),
        (
            with_encoder(nn.Sequential(Bare())),
            {},
            ValueError,
            r"fresh must be given .*\(got Bare at 'audio.0'\)",
        ),
        (
            with_encoder(Wide()),
            {},
            ValueError,
            r"the encoder of 'audio' must give features \[B, D\] \(got \[70, 1, 3\]\)",
        ),
        (with_encoder(Broken()), {}, ValueError, r"features of 'audio' must be finite"),
    ],
)
def test_bad_input(model: nn.Module, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"diagnose: {message}"):
        found_of(model, **options)
