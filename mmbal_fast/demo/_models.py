"""Small convolutional networks for images of 8x8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmbal_fast.demo._digits import Samples

CHANNELS = {"gray": 1, "color": 3}
"""Each modality, in the order of every model here, and the channels of its image."""

FEATURES = 64
"""Features that an encoder gives for each image."""


def images(samples: Samples, modalities: Sequence[str] = tuple(CHANNELS)) -> dict[str, Tensor]:
    """What a model of these modalities sees: ``[N, CHANNELS[m], 8, 8]`` for each."""
    return {name: getattr(samples, name) for name in modalities}


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def encoder(channels: int) -> nn.Sequential:
    """Three convolutions: ``[B, channels, 8, 8]`` to ``[B, FEATURES]``."""
    return nn.Sequential(
        convolution(channels, 16),
        convolution(16, 32, stride=2),
        convolution(32, FEATURES, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class LateFusion(nn.Module):
    """An encoder for each modality, concatenation, one linear head for the ten digits.

    Args:
        modalities: names in `CHANNELS`; one is a plain unimodal network.
    """

    def __init__(self, modalities: Sequence[str] = tuple(CHANNELS)) -> None:
        """See the class."""
        super().__init__()
        self.modalities = tuple(modalities)
        self.encoders = nn.ModuleDict({name: encoder(CHANNELS[name]) for name in modalities})
        self.head = nn.Linear(FEATURES * len(self.modalities), 10)
        # A third faster on the CPU, for images this small.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, samples: Samples) -> dict[str, Tensor]:
        """``[B, FEATURES]`` for each modality."""
        return {
            name: self.encoders[name](image.contiguous(memory_format=torch.channels_last))
            for name, image in images(samples, self.modalities).items()
        }

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[B, 10]`` from the features."""
        logits: Tensor = self.head(torch.cat(list(features.values()), dim=1))
        return logits
