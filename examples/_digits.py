"""What the digits examples train: real digits in two modalities, and a small network."""

from __future__ import annotations

from statistics import mean

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import mmbal_fast
from mmbal_fast.compare import colored_digits

PARTS = slice(0, 1200), slice(1200, None)


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """1200 digits to train on and 597 to test: gray image, colored image, label.

    The colour gives the label away in training, but not in the test.
    """
    inputs, label = colored_digits(torch.Generator().manual_seed(0))
    columns = inputs["gray"], inputs["color"], label
    train, test = (TensorDataset(*(each[part] for each in columns)) for part in PARTS)
    return train, test


class Net(nn.Module):
    """An encoder for each modality, concatenation, one linear head."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.encoders = nn.ModuleDict({"gray": self.encoder(1), "color": self.encoder(3)})
        self.head = nn.Linear(64, 10)

    @staticmethod
    def encoder(channels: int) -> nn.Sequential:
        """``[B, channels, 8, 8]`` to ``[B, 32]``."""
        return nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 32),
        )

    def forward(self, gray: Tensor, color: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The fused prediction, and what each modality predicts on its own: ``[B, 10]`` each."""
        features = {"gray": self.encoders["gray"](gray), "color": self.encoders["color"](color)}
        fused = self.head(torch.cat([features["gray"], features["color"]], dim=1))
        with torch.no_grad():
            logits = mmbal_fast.nn.unimodal_logits(features, self.head)
        return fused, logits


@torch.no_grad()
def accuracy(net: nn.Module, test: TensorDataset, device: torch.device) -> str:
    """Accuracy on the test set, as ``12.3 %``."""
    gray, color, label = (each.to(device) for each in test.tensors)
    net.eval()
    correct = net(gray, color)[0].argmax(dim=1) == label
    net.train()
    return f"{100 * correct.float().mean().item():.1f} %"


def coefficients(history: mmbal_fast.History, steps: int) -> str:
    """Mean of what the last steps scaled gradients by, as ``gray 1.00, color 0.50``."""
    table = history.to_dict()
    return ", ".join(
        f"{name} {mean(table[f'coefficients/{name}'][-steps:]):.2f}" for name in history.names
    )
