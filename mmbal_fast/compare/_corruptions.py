"""What can happen to a modality at test time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmbal_fast._task import Loader


class Scale(NamedTuple):
    """Of a modality's training inputs, over all samples and elements."""

    mean: float
    deviation: float


def scales(loader: Loader) -> dict[str, Scale]:
    """Mean and standard deviation of each modality's inputs."""
    sums: dict[str, Tensor] = {}
    for inputs, _ in loader:
        for name, each in inputs.items():
            x = each.double()
            moments = torch.stack([torch.tensor(float(x.numel())), x.sum(), x.square().sum()])
            sums[name] = sums.get(name, torch.zeros(())) + moments
    out = {}
    for name, moments in sums.items():
        count, total, squares = moments.tolist()
        mean = total / count
        out[name] = Scale(mean, max(squares / count - mean**2, 0.0) ** 0.5)
    return out


Corruption = Callable[[Tensor, Scale, torch.Generator], Tensor]


def _noise(x: Tensor, scale: Scale, generator: torch.Generator) -> Tensor:
    return x + 3 * scale.deviation * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def _missing(x: Tensor, scale: Scale, generator: torch.Generator) -> Tensor:
    return torch.zeros_like(x)


def _stuck(x: Tensor, scale: Scale, generator: torch.Generator) -> Tensor:
    return torch.full_like(x, scale.mean + scale.deviation)


def _gain(x: Tensor, scale: Scale, generator: torch.Generator) -> Tensor:
    return 2 * x


def _other(x: Tensor, scale: Scale, generator: torch.Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=generator)]


CORRUPTIONS: Mapping[str, Corruption] = {
    "noise": _noise,
    "missing": _missing,
    "stuck": _stuck,
    "gain": _gain,
    "other": _other,
}
"""By column: Gaussian noise of 3 standard deviations of the training inputs; zeros; every value one
standard deviation above the mean; doubled; that of another sample of the batch. They act on what
the network sees, so after a standardisation."""
