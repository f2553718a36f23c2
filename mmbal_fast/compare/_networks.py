"""The small networks of the built-in data sets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

FEATURES = 64
"""Features that each encoder gives for a sample."""


class LateFusion(nn.Module):
    """An encoder for each modality, concatenation, one linear head: a `FusionModel`.

    Args:
        encoders: from the modality's input to features ``[B, FEATURES]``.
        classes: C.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], classes: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.head = nn.Linear(FEATURES * len(self.encoders), classes)

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[B, C]``."""
        logits: Tensor = self.head(torch.cat(list(features.values()), dim=1))
        return logits

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[B, C]``."""
        return self.fuse({name: encoder(inputs[name]) for name, encoder in self.encoders.items()})


def image_encoder(channels: int) -> nn.Sequential:
    """Three convolutions for small images: ``[B, channels, H, W]`` to ``[B, FEATURES]``."""

    def convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    encoder = nn.Sequential(
        convolution(channels, 16, 1),
        convolution(16, 32, 2),
        convolution(32, FEATURES, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    # A third faster on the CPU, for images this small.
    return encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class _Windows(nn.Module):
    """A convolution over windows that do not overlap, batch norm and ReLU: one matrix product.

    ``[B, T, inputs]`` to ``[B, T // size, outputs]``. A convolution layer takes four times as long
    on the CPU, for signals this short.
    """

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.linear = nn.Linear(inputs * size, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, self.size * x.shape[2])
        out: Tensor = self.norm(self.linear(windows)).relu()
        grouped: Tensor = torch.unflatten(out, 0, (len(x), -1))
        return grouped


def signal_encoder(channels: int) -> nn.Sequential:
    """Three layers over windows of 5, 10 and 20 samples: ``[B, T, channels]`` to ``[B, FEATURES]``.

    T is a multiple of 20.
    """
    return nn.Sequential(
        _Windows(channels, 16, 5),
        _Windows(16, 32, 2),
        _Windows(32, FEATURES, 2),
        _MeanOverTime(),
    )


class _MeanOverTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def table_encoder(columns: int) -> nn.Sequential:
    """Two linear layers for measurements: ``[B, columns]`` to ``[B, FEATURES]``."""
    return nn.Sequential(
        nn.Linear(columns, FEATURES),
        nn.ReLU(),
        nn.Linear(FEATURES, FEATURES),
        nn.ReLU(),
    )
