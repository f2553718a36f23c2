"""A small network, real digits, and the plain loop that every integration is compared with."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset

import mmbal_fast
from mmbal_fast.compare import colored_digits

BATCH, RATE, MOMENTUM, ALPHA = 32, 0.05, 0.9, 0.5


class Digits(Dataset[dict[str, Tensor]]):
    """256 digits: gray, colour, labels."""

    def __init__(self) -> None:
        inputs, label = colored_digits(torch.Generator().manual_seed(0))
        self.columns = {**inputs, "labels": label}

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int | Tensor) -> dict[str, Tensor]:
        return {name: each[:256][index] for name, each in self.columns.items()}


class Net(nn.Module):
    """Without batch norm, so that two halves of a batch on two ranks are the batch."""

    def __init__(self, alpha: float = ALPHA, observes_in_evaluation: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.encoders = nn.ModuleDict(
                {name: self.encoder(size) for name, size in {"gray": 64, "color": 192}.items()}
            )
            self.head = nn.Linear(32, 10)
        self.balancer = mmbal_fast.OGMGE(self.encoders, alpha=alpha, noise=0.5, seed=3)
        self.observes_in_evaluation = observes_in_evaluation

    @staticmethod
    def encoder(size: int) -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), nn.Linear(size, 32), nn.Tanh(), nn.Linear(32, 16))

    def forward(self, gray: Tensor, color: Tensor, labels: Tensor) -> dict[str, Tensor]:
        features = {"gray": self.encoders["gray"](gray), "color": self.encoders["color"](color)}
        if self.training or self.observes_in_evaluation:
            logits = mmbal_fast.nn.unimodal_logits(features, self.head)
            self.balancer.observe(logits, labels)
        fused = self.head(torch.cat(list(features.values()), dim=1))
        return {"loss": cross_entropy(fused, labels), "logits": fused}


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)


def train_plainly(
    net: Net,
    *,
    epochs: int = 1,
    batch: int = BATCH,
    accumulate: int = 1,
    clip_before: float | None = None,
    clip_after: float | None = None,
    samples: int = 256,
) -> mmbal_fast.History:
    """What the frameworks do, written out."""
    optimizer = sgd(net)
    history = mmbal_fast.History(net.balancer.names)
    loader = DataLoader(Subset(Digits(), range(samples)), batch)
    for _ in range(epochs):
        batches = iter(loader)
        while group := list(islice(batches, accumulate)):
            for each in group:
                loss = net(**each)["loss"] / accumulate
                loss.backward()
            if clip_before is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip_before)
            history.record(net.balancer.step())
            if clip_after is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip_after)
            optimizer.step()
            optimizer.zero_grad()
    return history


def parameters(net: nn.Module) -> Tensor:
    """All of them in one vector."""
    return torch.cat([each.detach().flatten() for each in net.parameters()])


def table(history: mmbal_fast.History | None) -> Tensor:
    """float64 ``[steps, 7]``."""
    assert history is not None
    return torch.tensor(list(history.to_dict().values()), dtype=torch.float64).t()
