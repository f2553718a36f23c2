"""What the code on the pages expects to be there: small networks and batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mmbal_fast
from mmbal_fast.nn import MMTM, unimodal_logits


class Branch(nn.Module):
    """Two stages of convolutions and a classifier."""

    def __init__(self, channels: int, classes: int = 6) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 16, 3)])
        self.head = nn.Linear(16, classes)

    def classify(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.classify(x)


def _labels() -> Tensor:
    return torch.arange(12) % 6


def readme() -> dict[str, Any]:
    audio, visual, head = nn.Linear(4, 5), nn.Linear(6, 5), nn.Linear(10, 6)
    return {
        "torch": torch,
        "F": nn.functional,
        "head": head,
        "audio_net": audio,
        "visual_net": visual,
        "optimizer": torch.optim.SGD([*audio.parameters(), *head.parameters()], lr=0.1),
        "loader": [(torch.randn(12, 4), torch.randn(12, 6), _labels()) for _ in range(2)],
    }


def gradient_blending() -> dict[str, Any]:
    def batches() -> list[tuple[dict[str, Tensor], Tensor]]:
        """Samples that show their label, so that every head learns."""
        label = torch.nn.functional.one_hot(_labels(), 6).float()
        inputs = {name: label + 0.1 * torch.randn(12, 6) for name in ("audio", "image")}
        return [(inputs, _labels())] * 2

    def mean_losses(model: nn.Module, loader: Any) -> list[float]:
        (inputs, target), *_ = loader
        with torch.no_grad():
            return [float(cross_entropy(each, target)) for each in model(inputs).values()]

    return {
        "AudioNet": lambda: nn.Linear(6, 512),
        "ImageNet": lambda: nn.Linear(6, 512),
        "F": nn.functional,
        "epochs": 10,
        "train_loader": batches(),
        "held_out_loader": batches(),
        "mean_losses": mean_losses,
        "logits": [torch.randn(12, 6) for _ in range(3)],
        "weights": [0.2, 0.3, 0.5],
    }


def greedy() -> dict[str, Any]:
    batches = [(torch.randn(12, 3, 9, 9), torch.randn(12, 1, 7, 7), _labels()) for _ in range(3)]
    return {
        "Branch": Branch,
        "cross_entropy": cross_entropy,
        "train_loader": batches,
        "val_loader": batches,
        "device": "cpu",
    }


def training_stacks() -> dict[str, Any]:
    encoders = nn.ModuleDict({"audio": nn.Linear(4, 5), "image": nn.Linear(6, 5)})
    head = nn.Linear(10, 6)
    model = nn.ModuleList([encoders, head])

    def forward(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        features = {name: encoder(batch[name]) for name, encoder in encoders.items()}
        return head(torch.cat(list(features.values()), dim=1)), unimodal_logits(features, head)

    model.forward = forward  # type: ignore[assignment]
    batch = {"audio": torch.randn(12, 4), "image": torch.randn(12, 6)}
    return {
        "torch": torch,
        "device": "cpu",
        "model": model,
        "cross_entropy": cross_entropy,
        "micro_batches": [(batch, _labels())] * 2,
        "balancer": mmbal_fast.OGMGE(encoders, alpha=0.5),
        "scaler": torch.amp.GradScaler("cpu"),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "clip_grad_norm_": nn.utils.clip_grad_norm_,
    }


class Published(nn.Module):
    """Branches under the names of the OGM-GE repository, joined by MMTMs as in the greedy one."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_net, self.visual_net = Branch(3, 8), Branch(3, 8)
        self.mmtms: Any = nn.ModuleList(MMTM([width, width]) for width in (8, 16))

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {"audio": self.audio_net, "visual": self.visual_net}

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        stages = zip(self.audio_net.stages, self.visual_net.stages, self.mmtms, strict=True)
        for audio, visual, mmtm in stages:
            x, y = mmtm(audio(x), visual(y))
        return {"audio": self.audio_net.classify(x), "visual": self.visual_net.classify(y)}

    def main(self, branch: int) -> list[nn.Parameter]:
        return list((self.audio_net, self.visual_net)[branch].parameters())

    def bypass(self, branch: int) -> list[nn.Parameter]:
        return [each for mmtm in self.mmtms for each in mmtm.bypass_parameters(branch)]


def migrating() -> dict[str, Any]:
    model, head, label = Published(), nn.Linear(16, 6), _labels()
    batch = {name: torch.randn(12, 3, 9, 9) for name in model.encoders}
    features = {name: 3 * each for name, each in model(*batch.values()).items()}
    cross_entropy(head(torch.cat(list(features.values()), dim=1)), label).backward()
    theirs = {"fc_squeeze": (8, 16), "fc_visual": (6, 8), "fc_skeleton": (10, 8)}
    return {
        "torch": torch,
        "math": math,
        "mmbal_fast": mmbal_fast,
        "GreedyBalancing": mmbal_fast.GreedyBalancing,
        "MMTM": MMTM,
        "unimodal_logits": unimodal_logits,
        "cross_entropy": cross_entropy,
        "model": model,
        "head": head,
        "features": {name: each.detach() for name, each in features.items()},
        "label": label,
        "loader": [(batch, label)] * 2,
        "optimizer": torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1),
        "alpha": 0.3,
        "epoch": 1,
        "epochs": 2,
        "main": [0.0, 0.0],
        "bypass": [0.0, 0.0],
        "rebalance": lambda faster, steps: None,
        "visual_channels": 6,
        "skeleton_channels": 10,
        "old": {
            f"{layer}.{kind}": torch.randn(size if kind == "weight" else size[:1])
            for layer, size in theirs.items()
            for kind in ("weight", "bias")
        },
    }


def integrations() -> dict[str, Any]:
    from transformers import TrainingArguments

    from tests.integrations.training import Digits, Net

    model, digits = Net(), Digits()
    batch = digits[torch.arange(8)]
    features = {name: model.encoders[name](batch[name]) for name in ("gray", "color")}
    return {
        "mmbal_fast": mmbal_fast,
        "self": model,
        "logits": unimodal_logits(features, model.head),
        "labels": batch["labels"],
        "model": model,
        "dataset": digits,
        "arguments": TrainingArguments(
            output_dir=".",
            max_steps=1,
            per_device_train_batch_size=8,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
    }


PAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": readme,
    "docs/gradient_blending.md": gradient_blending,
    "docs/greedy.md": greedy,
    "docs/integrations.md": integrations,
    "docs/migrating.md": migrating,
    "docs/training_stacks.md": training_stacks,
}
"""The names that the blocks of a page begin with; none for a page that is not here."""
