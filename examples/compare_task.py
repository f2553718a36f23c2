"""Your own model and data in the table of every method.

    mmbal-fast compare --module examples/compare_task.py --seeds 3

A module needs two functions: ``model`` makes a new network, ``loaders`` the training, validation
and test data. This one makes up a task: two sensors see the same machine; one of them is easy to
read but sometimes wrong. Copy it, and put your network and your data in their places.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmbal_fast.compare import Loaders

epochs = 10  # optional; default 20
rates = {"sgd": (0.01, 0.1), "adamw": (0.001, 0.01)}  # optional; learning rates to choose from

CLASSES = 4


class Model(nn.Module):
    """An encoder for each modality, and a fusion of any kind."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.encoders = nn.ModuleDict(
            {
                "vibration": nn.Sequential(nn.Linear(16, 32), nn.ReLU()),
                "sound": nn.Sequential(nn.Linear(24, 32), nn.ReLU()),
            }
        )
        self.fusion = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[B, C]`` from the features ``[B, D_m]`` of all modalities."""
        logits: Tensor = self.fusion(torch.cat(list(features.values()), dim=1))
        return logits


def model() -> Model:
    """A new network; torch's generator is seeded before."""
    return Model()


def loaders(seed: int) -> Loaders:
    """Training, validation and test data: batches ``({name: inputs}, labels)``."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(800) % CLASSES
    wrong = torch.rand(len(label), generator=generator) < 0.1
    heard = torch.where(wrong, label.roll(1), label)
    inputs = {
        "vibration": _signal(label, 16, 3.0, generator),
        "sound": _signal(heard, 24, 0.5, generator),
    }
    samples = [
        ({name: each[index] for name, each in inputs.items()}, label[index])
        for index in torch.randperm(len(label), generator=generator).tolist()
    ]
    return Loaders(
        train=DataLoader(samples[:400], batch_size=32, shuffle=True, generator=generator),
        validation=DataLoader(samples[400:500], batch_size=100),
        test=DataLoader(samples[500:], batch_size=100),
    )


def _signal(label: Tensor, width: int, noise: float, generator: torch.Generator) -> Tensor:
    """``[N, width]``: a pattern for each class, and noise."""
    patterns = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(width))
    return patterns[label] + noise * torch.randn(len(label), width, generator=generator)
