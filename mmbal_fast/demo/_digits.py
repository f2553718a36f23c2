"""Real handwritten digits as pairs of a gray and a colored image."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor

TRAIN = 1200
"""Training samples; the other 597 of the 1797 are the test set."""

AGREEMENT = 0.95
"""Share of the training images whose colour is that of their label."""

PALETTE = torch.tensor([colorsys.hsv_to_rgb(hue / 10, 1.0, 1.0) for hue in range(10)])
"""float32 ``[10, 3]``: the colour of each label, evenly spaced hues."""


@dataclass(frozen=True)
class Samples:
    """N handwritten digits, each seen in two modalities."""

    gray: Tensor
    """float32 ``[N, 1, 8, 8]``, 0 (paper) to 1 (ink)."""
    color: Tensor
    """float32 ``[N, 3, 8, 8]``: the gray image times its tint."""
    label: Tensor
    """int64 ``[N]``, 0 to 9."""
    tint: Tensor
    """int64 ``[N]``: the label whose colour the image has."""

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: Tensor | slice) -> Samples:
        return Samples(self.gray[index], self.color[index], self.label[index], self.tint[index])


@cache
def _images() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    return torch.tensor(digits.images / 16.0, dtype=torch.float32), torch.tensor(digits.target)


def load(seed: int) -> tuple[Samples, Samples]:
    """The training and the test set: a split and a colouring drawn from the seed.

    In training the colour agrees with the label 95 % of the time and is otherwise one of the nine
    others; in the test set it is any of the ten at random, so that only the shape tells the digit.
    The colored-and-gray pairs of Wu et al., "Characterizing and Overcoming the Greedy Nature of
    Learning in Multi-modal Deep Neural Networks" (ICML 2022), made of the digits that ship with
    scikit-learn.

    Args:
        seed: decides which images are in which set, and their colours.

    Returns:
        1200 and 597 samples.

    Example:
        >>> from mmbal_fast.demo._digits import load
        >>> train, test = load(seed=0)
        >>> len(train), len(test), tuple(train.color.shape)
        (1200, 597, (1200, 3, 8, 8))
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = _images()
    order = torch.randperm(len(labels), generator=generator)
    gray, label = images[order].unsqueeze(1), labels[order]
    other = (label + torch.randint(1, 10, label.shape, generator=generator)) % 10
    agrees = torch.rand(label.shape, generator=generator) < AGREEMENT
    tint = torch.where(agrees, label, other)
    tint[TRAIN:] = torch.randint(10, label[TRAIN:].shape, generator=generator)
    samples = Samples(gray, gray * PALETTE[tint, :, None, None], label, tint)
    return samples[:TRAIN], samples[TRAIN:]
