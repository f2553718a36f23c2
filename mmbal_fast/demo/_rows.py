"""What the demo compares: a `Row` for each way to train, and how to add one.

A row names a `Learner`: a model with its optimizer and one training step. The loop that shuffles,
times, evaluates and repeats over seeds is in `_training`, and knows of nothing here but the names
of `Learner`. A learner that needs validation data sets ``held_out``: it then gets that many samples
less for training. The test set it never sees.

To add a row: write a `Learner`, add a `Row` to `ROWS`, and if it records curves of its own, add a
panel to `_report.PANELS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

import mmbal_fast
from mmbal_fast import functional
from mmbal_fast.demo._digits import Samples
from mmbal_fast.demo._models import CHANNELS, LateFusion
from mmbal_fast.demo._recorder import Recorder
from mmbal_fast.nn import unimodal_logits


@dataclass(frozen=True)
class Settings:
    """What holds for all rows."""

    epochs: int = 20
    alpha: float = 1.0
    """Strength of the modulation."""
    batch_size: int = 64
    learning_rate: float = 0.01
    momentum: float = 0.9


@dataclass(frozen=True)
class Setup:
    """What a learner is made from. Torch's generators are seeded before it is."""

    train: Samples
    validation: Samples
    """The samples held out from training; empty if the row asked for none."""
    settings: Settings
    seed: int
    recorder: Recorder


class Learner(Protocol):
    """A model in training."""

    @property
    def model(self) -> torch.nn.Module:
        """Whose mode the evaluation switches."""
        ...

    def step(self, batch: Samples) -> None:
        """One step of the optimizer.

        What the method adds to a plain step runs inside ``with recorder.added():``.
        """

    def predict(self, samples: Samples) -> dict[str, Tensor]:
        """Logits ``[N, 10]``: under "model" those that count, under a modality's name its own.

        The model is in evaluation mode and autograd is off.
        """

    def end_epoch(self) -> None:
        """Called after each epoch, before the evaluation."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    key: str
    """Its name on the command line."""
    label: str
    learner: Callable[[Setup], Learner]
    held_out: int = 0
    """How many of the 1200 training samples are for validation."""


class Plain:
    """Late fusion with cross-entropy and SGD; of one modality: an ordinary network."""

    def __init__(self, setup: Setup, modalities: tuple[str, ...] = tuple(CHANNELS)) -> None:
        """Makes the model and the optimizer."""
        self.recorder = setup.recorder
        self.model = LateFusion(modalities)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=setup.settings.learning_rate,
            momentum=setup.settings.momentum,
            fused=True,
        )

    def step(self, batch: Samples) -> None:
        """Forward, backward, update, with `after_backward` in between."""
        features = self.model.features(batch)
        loss = F.cross_entropy(self.model.fuse(features), batch.label)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.after_backward({name: each.detach() for name, each in features.items()}, batch.label)
        self.optimizer.step()

    def after_backward(self, features: Mapping[str, Tensor], target: Tensor) -> None:
        """Where a method changes the gradients."""

    def predict(self, samples: Samples) -> dict[str, Tensor]:
        """The fused prediction and each modality's share of it."""
        features = self.model.features(samples)
        fused = {"model": self.model.fuse(features)}
        return fused if len(features) == 1 else fused | unimodal_logits(features, self.model.head)

    def end_epoch(self) -> None:
        """Nothing to do."""


class Joint(Plain):
    """Plain training on both modalities; records how far they drift apart."""

    def after_backward(self, features: Mapping[str, Tensor], target: Tensor) -> None:
        """Measures what a modulated row would."""
        with torch.no_grad():
            logits = unimodal_logits(features, self.model.head)
        scores = functional.contribution_scores(list(logits.values()), target)
        self.recorder.log("ratio", functional.discrepancy_ratios(scores), self.model.modalities)


class Modulated(Plain):
    """OGM-GE, or without noise OGM."""

    def __init__(self, setup: Setup, noise: float) -> None:
        """As `Plain`, and a balancer."""
        super().__init__(setup)
        self.balancer = mmbal_fast.OGMGE(
            self.model.encoders, alpha=setup.settings.alpha, noise=noise, seed=setup.seed
        )

    def after_backward(self, features: Mapping[str, Tensor], target: Tensor) -> None:
        """The method: scores, ratios, coefficients, gradients."""
        with self.recorder.added(), torch.no_grad():
            record = self.balancer.step(unimodal_logits(features, self.model.head), target)
        names = self.balancer.modality_names
        self.recorder.log("ratio", record.ratios, names)
        self.recorder.log("coefficient", record.coefficients, names)


ROWS = {
    row.key: row
    for row in (
        Row("gray", "gray alone", partial(Plain, modalities=("gray",))),
        Row("color", "colour alone", partial(Plain, modalities=("color",))),
        Row("joint", "joint", Joint),
        Row("ogm", "joint + OGM", partial(Modulated, noise=0.0)),
        Row("ogm-ge", "joint + OGM-GE", partial(Modulated, noise=1.0)),
    )
}
