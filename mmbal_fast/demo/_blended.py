"""Gradient-Blending on the digits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmbal_fast import GradientBlending, estimate_blending_weights
from mmbal_fast.demo._digits import Samples
from mmbal_fast.demo._learner import Setup
from mmbal_fast.demo._models import CHANNELS, FEATURES, encoder, images
from mmbal_fast.demo._recorder import Recorder
from mmbal_fast.nn import MultiHeadLateFusion

HELD_OUT = 200
"""Training samples that the losses are validated on."""

SUPER_EPOCH = 4
"""Epochs between two measurements, online; how long each head trains alone, offline."""


class Blended:
    """Late fusion with a head per modality, the losses weighted by Gradient-Blending.

    Args:
        setup: data and settings.
        online: measure every super-epoch; otherwise once, before training, each head alone.
    """

    def __init__(self, setup: Setup, online: bool) -> None:
        """Makes the model; offline, estimates the weights."""
        self.setup = setup
        self.online = online
        self.epoch = 0
        encoders = {name: encoder(channels) for name, channels in CHANNELS.items()}
        self.model = MultiHeadLateFusion(encoders, dict.fromkeys(CHANNELS, FEATURES), 10)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.blending = GradientBlending(self.model.head_names)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=setup.settings.learning_rate,
            momentum=setup.settings.momentum,
            fused=True,
        )
        if not online:
            estimate = estimate_blending_weights(
                self.model,
                self.model.head_names,
                self._train_epoch,
                lambda model: (self._losses(setup.train), self._losses(setup.validation)),
                epochs=SUPER_EPOCH,
                restore=[self.optimizer],
                verbose=False,
            )
            self.blending.weights = estimate.weights
            self._log(setup.recorder, estimate.ratio)

    def step(self, batch: Samples) -> None:
        """One step on the blended loss."""
        logits = self.model(images(batch))
        with self.setup.recorder.added():
            loss = self.blending.loss(logits, batch.label)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def predict(self, samples: Samples) -> dict[str, Tensor]:
        """The fused head counts."""
        logits: Mapping[str, Tensor] = self.model(images(samples))
        return {"model" if name == "fused" else name: each for name, each in logits.items()}

    def end_epoch(self) -> None:
        """Online: measures at the end of a super-epoch."""
        self.epoch += 1
        if self.online and self.epoch % SUPER_EPOCH == 0:
            train, validation = self.setup.train, self.setup.validation
            self.blending.record("train", self._losses(train), len(train))
            self.blending.record("validation", self._losses(validation), len(validation))
            measured = self.blending.update()
            if len(self.blending.history) > 1:
                self._log(self.setup.recorder, measured.ratio)

    def _log(self, recorder: Recorder, ratio: Tensor) -> None:
        recorder.log("weight", self.blending.weights, self.model.head_names)
        recorder.log("OGR", ratio, self.model.head_names)

    @torch.no_grad()
    def _losses(self, samples: Samples) -> Tensor:
        self.model.eval()
        self.blending.loss(self.model(images(samples)), samples.label)
        self.model.train()
        assert self.blending.last is not None
        return self.blending.last.losses

    def _train_epoch(self, model: torch.nn.Module, weights: Tensor) -> None:
        self.blending.weights = weights
        train, size = self.setup.train, self.setup.settings.batch_size
        shuffled = train[torch.randperm(len(train))]
        for start in range(0, len(train), size):
            self.step(shuffled[start : start + size])
