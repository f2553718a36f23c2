"""Every public method in a small training, for the tests that all of them must pass.

A new method adds its `Case` to `CASES`; `test_contract.py` fails until it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.functional import cross_entropy

import mmbal_fast
from mmbal_fast.nn import MMTM, unimodal_logits
from mmbal_fast.training import Method

NAMES = ("audio", "image", "text")
WIDTHS = {"audio": 6, "image": 5, "text": 4}
CLASSES = 3


class Net(nn.Module):
    """An encoder and a head for each modality, and a linear head over all features."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(width, 9), nn.Tanh(), nn.Linear(9, 4))
                for name, width in WIDTHS.items()
            }
        )
        self.heads = nn.ModuleDict({name: nn.Linear(4, CLASSES) for name in NAMES})
        self.head = nn.Linear(4 * len(NAMES), CLASSES)

    def features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.encoders[name](batch[name]) for name in NAMES}

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.head(torch.cat(list(features.values()), dim=1))


class Joined(nn.Module):
    """Three branches with an MMTM between their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.branches: Any = nn.ModuleDict(
            {
                name: nn.ModuleList([nn.Linear(width, 4), nn.Linear(4, CLASSES)])
                for name, width in WIDTHS.items()
            }
        )
        self.mmtm = MMTM([4] * len(NAMES))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.mmtm(*(self.branches[name][0](batch[name]) for name in NAMES))
        return {
            name: self.branches[name][1](each.tanh())
            for name, each in zip(NAMES, hidden, strict=True)
        }


def filled(model: nn.Module, seed: int = 1) -> nn.Module:
    """With weights that no default dtype, device or generator plays a part in."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(
            parameter.shape, generator=generator, dtype=torch.float32, device="cpu"
        )
        parameter.data = (values / 3).to(torch.float32)
    return model.float()


def batch_of(number: int, size: int = 8) -> tuple[dict[str, Tensor], Tensor]:
    """The label shows in each modality, in some more than in others."""
    generator = torch.Generator(device="cpu").manual_seed(number)
    target = torch.randint(CLASSES, (size,), generator=generator, device="cpu")
    batch = {}
    for strength, (name, width) in enumerate(WIDTHS.items()):
        noise = torch.randn(size, width, generator=generator, dtype=torch.float32, device="cpu")
        batch[name] = noise + strength * target.unsqueeze(1)
    return batch, target


class Run:
    """A model, its optimizer and a method; `step` is one whole training step."""

    model: nn.Module
    method: Any
    part = slice(None)
    """Of every batch: this rank's samples."""
    average: Callable[[Tensor], object] | None = None
    """Takes the mean of a gradient over the ranks, in place, as DistributedDataParallel does."""

    def batch(self, number: int) -> tuple[dict[str, Tensor], Tensor]:
        batch, target = batch_of(number)
        return {name: each[self.part] for name, each in batch.items()}, target[self.part]

    def __init__(self, model: nn.Module, method: Method) -> None:
        self.model, self.method = model, method
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def backward(self, number: int, scale: Callable[[Tensor], Tensor]) -> Any:
        """Ends with gradients; returns what `act` needs."""
        raise NotImplementedError

    def act(self, given: Any, **scaling: Any) -> None:
        """What the method does between backward and the optimizer's step."""

    def step(
        self, number: int, scaler: GradScaler | None = None, spoil: Callable[[], None] | None = None
    ) -> None:
        self.optimizer.zero_grad()
        given = self.backward(number, scaler.scale if scaler is not None else lambda loss: loss)
        if self.average is not None:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    self.average(parameter.grad)
        if spoil is not None:
            spoil()
        if scaler is None:
            self.act(given)
            self.optimizer.step()
        else:
            self.act(given, grad_scaler=scaler, optimizer=self.optimizer)
            scaler.step(self.optimizer)
            scaler.update()

    def bits(self) -> list[Tensor]:
        """Everything that training changes."""
        moments = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        tensors = [*self.model.parameters(), *self.model.buffers(), *moments]
        return [each.detach().clone() for each in tensors]


class Modulated(Run):
    """A modulation of gradients by logits."""

    model: Net

    def backward(self, number: int, scale: Callable[[Tensor], Tensor]) -> Any:
        batch, target = self.batch(number)
        features = self.model.features(batch)
        scale(cross_entropy(self.model(features), target)).backward()
        logits = unimodal_logits(features, self.model.head)
        return {name: each.detach() for name, each in logits.items()}, target

    def act(self, given: Any, **scaling: Any) -> None:
        self.method.step(*given, **scaling)


class Weighted(Run):
    """A weighting of the heads' losses, with a measurement every other step."""

    model: Net

    def backward(self, number: int, scale: Callable[[Tensor], Tensor]) -> Any:
        batch, target = self.batch(number)
        features = self.model.features(batch)
        logits = {name: self.model.heads[name](each) for name, each in features.items()}
        scale(self.method.loss({**logits, "fused": self.model(features)}, target)).backward()
        if hasattr(self.method, "record"):
            self.method.record("train", self.method.last)
            if number % 2:
                self.method.record("validation", [1.0 / (number + k + 1) for k in range(4)], 5)
                self.method.update()


class Routed(Run):
    """Losses of each modality's own head, and of a fusion of detached features."""

    model: Net

    def backward(self, number: int, scale: Callable[[Tensor], Tensor]) -> Any:
        batch, target = self.batch(number)
        features = self.model.features(batch)
        own = {
            name: cross_entropy(self.model.heads[name](each), target)
            for name, each in features.items()
        }
        fused = cross_entropy(self.model(self.method.detached(features)), target)
        scale(self.method.loss(fused, own)).backward()


class Combined(Run):
    """Two gradients of every encoder."""

    model: Net

    def backward(self, number: int, scale: Callable[[Tensor], Tensor]) -> Any:
        batch, target = self.batch(number)
        features = self.model.features(batch)
        losses = {
            name: cross_entropy(self.model.heads[name](each), target)
            for name, each in features.items()
        }
        losses["fused"] = cross_entropy(self.model(features), target)
        self.method.backward({name: scale(each) for name, each in losses.items()})

    def act(self, given: Any, **scaling: Any) -> None:
        self.method.step(**scaling)


class Relearned(Run):
    """Encoders are pulled back every third step."""

    model: Net

    def backward(self, number: int, scale: Callable[[Tensor], Tensor]) -> Any:
        batch, target = self.batch(number)
        if number == 0 and self.method._first is None:
            self.method.remember()  # made on the meta device
        if number % 3 == 2:
            self.method.step({"audio": 0.1, "image": 0.0, "text": 0.3}, optimizer=self.optimizer)
        scale(cross_entropy(self.model(self.model.features(batch)), target)).backward()


class Dropping(Run):
    """Features are dropped before the fusion."""

    model: Net

    def backward(self, number: int, scale: Callable[[Tensor], Tensor]) -> Any:
        batch, target = self.batch(number)
        features = self.model.features(batch)
        logits = unimodal_logits(features, self.model.head)
        self.method.observe({name: each.detach() for name, each in logits.items()}, target)
        dropped, weight = self.method(features)
        losses = cross_entropy(self.model(dropped), target, reduction="none")
        scale((losses * weight).sum() / len(target)).backward()


class Featured(Run):
    """A method that changes the features before the fusion."""

    model: Net

    def backward(self, number: int, scale: Callable[[Tensor], Tensor]) -> Any:
        batch, target = self.batch(number)
        features = self.method(self.model.features(batch))
        scale(cross_entropy(self.model(features), target)).backward()


class Branched(Run):
    """Branches joined by an MMTM."""

    def backward(self, number: int, scale: Callable[[Tensor], Tensor]) -> Any:
        batch, target = self.batch(number)
        losses = [cross_entropy(each, target) for each in self.model(batch).values()]
        scale(torch.stack(losses).sum()).backward()

    def act(self, given: Any, **scaling: Any) -> None:
        self.method.step(**scaling)


@dataclass(frozen=True)
class Case:
    """A public method, and how the tests train with it."""

    name: str
    method: type[Method]
    run: Callable[[], Run]
    settings: dict[str, tuple[Any, Any]]
    """For every `Setting` another value, and one that is refused."""
    bad_calls: tuple[Callable[[Run], object], ...] = ()
    """Calls that must raise and change nothing; gradients are there when they come."""
    alike: bool = True
    """Whether ranks with a part of a batch each do what one process does with all of it."""
    skips: bool = True
    """Whether a `GradScaler` that skips a step concerns it."""

    def __str__(self) -> str:
        return self.name


def modulation(method: type, **options: Any) -> Callable[[], Run]:
    """A run of a gradient modulation."""

    def run() -> Run:
        net = filled(Net())
        return Modulated(net, method(net.encoders, **options))

    return run


def adaptive() -> Run:
    """A run of AGM with the head's columns."""
    net: Any = filled(Net())
    method = mmbal_fast.AGM(net.encoders, alpha=0.5, head=net.head, widths=dict.fromkeys(NAMES, 4))
    return Modulated(net, method)


class Regulated(Modulated):
    """InfoReg, with epochs of four steps."""

    def backward(self, number: int, scale: Callable[[Tensor], Tensor]) -> Any:
        if number % 4 == 0:
            self.method.start_epoch()
        return super().backward(number, scale)


def regulated() -> Run:
    """A run of InfoReg."""
    net: Any = filled(Net())
    return Regulated(net, mmbal_fast.InfoReg(net.encoders))


def weighting(method: type) -> Callable[[], Run]:
    """A run of a weighting of losses."""
    return lambda: Weighted(filled(Net()), method([*NAMES, "fused"]))


def greedy() -> Run:
    """A run of greedy balancing with short windows."""
    net = filled(Joined())
    return Branched(
        net, mmbal_fast.GreedyBalancing(net, warmup_steps=1, window=2, epsilon=0.0, log_size=7)
    )


def shuffling() -> Run:
    """A run that shuffles two of three modalities."""
    return Featured(
        filled(Net()), mmbal_fast.fusion.ShuffleModality(NAMES, anchor="text", probability=0.6)
    )


def relearning() -> Run:
    """A run of re-learning."""
    net: Any = filled(Net())
    return Relearned(net, mmbal_fast.Relearning(net.encoders))


def combining() -> Run:
    """A run of MMPareto."""
    net: Any = filled(Net())
    return Combined(net, mmbal_fast.MMPareto(net.encoders))


LOGITS = {name: torch.zeros(2, CLASSES, dtype=torch.float32, device="cpu") for name in NAMES}
LABELS = torch.zeros(2, dtype=torch.int64, device="cpu")

MODULATION_CALLS: tuple[Callable[[Run], object], ...] = (
    lambda run: run.method.step(),
    lambda run: run.method.step({"audio": LOGITS["audio"]}, LABELS),
    lambda run: run.method.step(LOGITS, LABELS[:1]),
    lambda run: run.method.step(LOGITS),
    lambda run: run.method.step(LOGITS, LABELS + 7),
    lambda run: run.method.step(LOGITS, LABELS, class_dim=5),
    lambda run: run.method.step(LOGITS, LABELS, grad_scaler=GradScaler("cpu")),
    lambda run: run.method.step(
        LOGITS, LABELS, grad_scaler=GradScaler("cpu"), optimizer="optimizer"
    ),
    lambda run: run.method.observe(LOGITS, LABELS, scores=torch.ones(3)),
    lambda run: run.method.observe(scores=torch.ones(2)),
)
WEIGHTING_CALLS: tuple[Callable[[Run], object], ...] = (
    lambda run: run.method.loss(LOGITS, LABELS),
    lambda run: run.method.loss({**LOGITS, "fused": LOGITS["text"]}, LABELS[:1]),
    lambda run: run.method.loss({**LOGITS, "fused": LOGITS["text"]}, LABELS + 7),
    lambda run: setattr(run.method, "weights", [1.0, float("nan"), 1.0, 1.0]),
    lambda run: setattr(run.method, "weights", [1.0]),
)
WEIGHTING_SETTINGS = {"label_smoothing": (0.1, 2.0), "ignore_index": (7, 1.5)}

OWN = {name: torch.zeros(()) for name in NAMES}

CASES = (
    Case(
        "OGM-GE",
        mmbal_fast.OGMGE,
        modulation(mmbal_fast.OGMGE, alpha=0.5, seed=3),
        {"alpha": (0.1, -1), "noise": (0.5, "1"), "rule": ("tpami2024", "cvpr2023")},
        MODULATION_CALLS,
    ),
    Case(
        "AGM", mmbal_fast.AGM, adaptive, {"alpha": (0.1, -1), "noise": (0.5, "1")}, MODULATION_CALLS
    ),
    Case(
        "MLB",
        mmbal_fast.MLB,
        modulation(mmbal_fast.MLB, alpha=0.5),
        {"alpha": (0.1, -1), "noise": (0.5, "1"), "beta": (1.5, 0.5)},
        MODULATION_CALLS,
    ),
    Case(
        "metric modulation",
        mmbal_fast.MetricModulation,
        modulation(mmbal_fast.MetricModulation),
        {"rho": (0.1, -1), "noise": (0.5, "1")},
        (
            *MODULATION_CALLS,
            lambda run: run.method.step(LOGITS, LABELS, metrics=torch.ones(3)),
            lambda run: run.method.step(metrics={"audio": 1.0}),
        ),
    ),
    Case(
        "InfoReg",
        mmbal_fast.InfoReg,
        regulated,
        {"window": (0.1, -1), "noise": (0.5, "1")},
        MODULATION_CALLS,
    ),
    Case(
        "uniform",
        mmbal_fast.LossWeighting,
        weighting(mmbal_fast.LossWeighting),
        WEIGHTING_SETTINGS,
        WEIGHTING_CALLS,
        skips=False,
    ),
    Case(
        "Gradient-Blending",
        mmbal_fast.GradientBlending,
        weighting(mmbal_fast.GradientBlending),
        {**WEIGHTING_SETTINGS, "floor": (0.2, 0.0)},
        (
            *WEIGHTING_CALLS,
            lambda run: run.method.record("test", [1.0] * 4, 1),
            lambda run: run.method.record("train", [1.0] * 3, 1),
        ),
        skips=False,
    ),
    Case(
        "DGL",
        mmbal_fast.DGL,
        lambda: Routed(filled(Net()), mmbal_fast.DGL(NAMES)),
        {"alpha": (1.5, -1.0)},
        (
            lambda run: run.method.detached({"audio": LOGITS["audio"]}),
            lambda run: run.method.loss(torch.zeros(()), {"audio": torch.zeros(())}),
            lambda run: run.method.loss(torch.zeros(2), OWN),
            lambda run: run.method.loss(torch.zeros(()), [torch.zeros(())] * 3),
        ),
        skips=False,
    ),
    Case(
        "MMPareto",
        mmbal_fast.MMPareto,
        combining,
        {"gamma": (1.0, -1.0)},
        (
            lambda run: run.method.backward({"fused": torch.zeros(())}),
            lambda run: run.method.backward({**OWN, "fused": torch.zeros(())}),
            lambda run: run.method.step(grad_scaler=GradScaler("cpu")),
        ),
    ),
    Case(
        "re-learning",
        mmbal_fast.Relearning,
        relearning,
        {"strength": (1.0, -1.0)},
        (
            lambda run: run.method.step({"audio": 0.1}),
            lambda run: run.method.step(dict.fromkeys(NAMES, float("inf"))),
        ),
        skips=False,
    ),
    Case(
        "OPM",
        mmbal_fast.OPM,
        lambda: Dropping(filled(Net()), mmbal_fast.OPM(NAMES, seed=3)),
        {"base": (0.3, 1.5), "strength": (0.1, -1.0), "apply": (1.0, float("nan"))},
        (
            lambda run: run.method({"audio": LOGITS["audio"]}),
            lambda run: run.method({**LOGITS, "text": LOGITS["text"][:1]}),
            lambda run: run.method({**LOGITS, "text": LABELS}),
            lambda run: run.method.observe({"audio": LOGITS["audio"]}, LABELS),
            lambda run: run.method.observe(LOGITS, LABELS + 7),
        ),
        alike=False,  # each rank draws for its own samples
        skips=False,
    ),
    Case(
        "greedy balancing",
        mmbal_fast.GreedyBalancing,
        greedy,
        {"warmup_steps": (3, -1), "epsilon": (0.5, float("nan")), "window": (4, 2.5)},
        (lambda run: run.method.step(grad_scaler=GradScaler("cpu")),),
        alike=False,  # MMTMs average over their own rank's samples unless asked for more
    ),
    Case(
        "shuffling",
        mmbal_fast.fusion.ShuffleModality,
        shuffling,
        {"probability": (0.3, 1.5)},
        (
            lambda run: run.method({"audio": LOGITS["audio"]}),
            lambda run: run.method({**LOGITS, "text": LOGITS["text"][:1]}),
            lambda run: run.method({**LOGITS, "text": LABELS}),
            lambda run: run.method.observe(LOGITS, LABELS + 7),
            lambda run: run.method.choose_anchor(),
            lambda run: setattr(run.method, "anchor", "smell"),
        ),
        alike=False,  # partners are of the same rank
        skips=False,
    ),
)
