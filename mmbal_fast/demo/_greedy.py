"""Networks joined by MMTMs on the digits, trained plainly and balanced."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbal_fast import ConditionalLearningSpeed, GreedyBalancing, conditional_utilization
from mmbal_fast.demo._digits import Samples
from mmbal_fast.demo._learner import Setup
from mmbal_fast.demo._models import CHANNELS, FEATURES, convolution, images
from mmbal_fast.nn import MMTM

HELD_OUT = 200
"""Training samples that the conditional utilization is measured on."""


class Branch(nn.Module):
    """The encoder of the other rows, in the pieces between which an MMTM acts, and a head."""

    def __init__(self, channels: int) -> None:
        """Makes the layers."""
        super().__init__()
        self.first = convolution(channels, 16)
        self.second = convolution(16, 32, stride=2)
        self.third = convolution(32, FEATURES, stride=2)
        self.head = nn.Linear(FEATURES, 10)


class Joined(nn.Module):
    """A branch per modality, joined by MMTMs behind the second and the third convolution."""

    def __init__(self) -> None:
        """Makes the branches and the MMTMs."""
        super().__init__()
        self.gray = Branch(CHANNELS["gray"])
        self.color = Branch(CHANNELS["color"])
        self.mmtms = nn.ModuleList([MMTM([32, 32]), MMTM([FEATURES, FEATURES])])

    def forward(self, gray: Tensor, color: Tensor) -> dict[str, Tensor]:
        """Logits of each branch, ``[B, 10]``."""
        middle, last = self.mmtms
        gray, color = self.gray.first(gray), self.color.first(color)
        gray, color = middle(self.gray.second(gray), self.color.second(color))
        gray, color = last(self.gray.third(gray), self.color.third(color))
        return {
            "gray": self.gray.head(gray.mean(dim=(2, 3))),
            "color": self.color.head(color.mean(dim=(2, 3))),
        }


class Greedy:
    """The sum of the branches' losses, the mean of their logits, with or without balancing."""

    def __init__(self, setup: Setup, balanced: bool) -> None:
        """Makes the model, the optimizer and what measures the learning speeds."""
        self.setup = setup
        self.epoch = 0
        self.model = Joined()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=setup.settings.learning_rate,
            momentum=setup.settings.momentum,
            fused=True,
        )
        self.balancing: GreedyBalancing | None = None
        if balanced:
            steps = -(-len(setup.train) // setup.settings.batch_size)
            self.balancing = GreedyBalancing(self.model, warmup_steps=steps)
        else:
            self.speed = ConditionalLearningSpeed.from_model(self.model)

    def step(self, batch: Samples) -> None:
        """One step; the speeds are recorded in both rows."""
        logits = self.model(*images(batch).values())
        loss = torch.stack([F.cross_entropy(each, batch.label) for each in logits.values()]).sum()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.balancing is None:
            self.speed.update()
            speed = self.speed.speed
        else:
            with self.setup.recorder.added():
                record = self.balancing.step()
            speed = record.speed
            self.setup.recorder.log("rebalancing", (record.branch >= 0).double()[None], ["on"])
        self.setup.recorder.log("speed", speed, list(CHANNELS))
        self.optimizer.step()

    def predict(self, samples: Samples) -> dict[str, Tensor]:
        """The mean of the branches' logits counts."""
        logits = self.model(*images(samples).values())
        return {"model": torch.stack(list(logits.values())).mean(dim=0), **logits}

    def end_epoch(self) -> None:
        """After the last epoch, measures how much each branch owes to the other."""
        self.epoch += 1
        if self.epoch == self.setup.settings.epochs:
            train, validation = (
                [(*images(samples).values(), samples.label)]
                for samples in (self.setup.train, self.setup.validation)
            )
            table = conditional_utilization(
                self.model, validation, train_loader=train, progress=False
            )
            self.setup.recorder.measures["d_util"] = table.d_util
