"""What the rows of the demo have in common: settings, the training step, plain training.

The loop that shuffles, times, evaluates and repeats over seeds is in `_training`, and knows of
nothing here but the names of `Learner`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

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
