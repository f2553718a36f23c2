"""Balanced training with the Trainer of Hugging Face Transformers.

    python examples/transformers_digits.py --epochs 3

Needs scikit-learn and ``pip install mmbal-fast[transformers]``; started by
``torchrun --nproc-per-node 2`` it trains on two processes. The Trainer prints what it logs, which
includes ``balance/...``, and this script, with numbers that differ between processors:

    test accuracy 77.2 %
    coefficients in the last epoch: gray 0.50, color 0.97

A plot of scores, ratios and coefficients is in ``runs/transformers_digits``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _digits import Net, coefficients, datasets
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed

import mmbal_fast
from mmbal_fast.integrations.transformers import BalancingCallback


class Classifier(nn.Module):
    """Late fusion of a gray and a colored image."""

    def __init__(self) -> None:
        """The balancer belongs to the model; the callback finds it by its name."""
        super().__init__()
        self.net = Net()
        self.balancer = mmbal_fast.OGMGE(self.net.encoders, alpha=0.5)

    def forward(self, gray: Tensor, color: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Hands over each modality's logits in training, and returns what the Trainer expects."""
        fused, logits = self.net(gray, color)
        if self.training:  # the Trainer evaluates with the same method
            self.balancer.observe(logits, labels)
        return {"loss": cross_entropy(fused, labels), "logits": fused}


def collate(samples: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """Samples as the model's arguments."""
    gray, color, labels = (torch.stack(each) for each in zip(*samples, strict=True))
    return {"gray": gray, "color": color, "labels": labels}


def accuracy(prediction: EvalPrediction) -> dict[str, Any]:
    """Of the whole test set."""
    logits: Any = prediction.predictions
    return {"accuracy": (logits.argmax(-1) == prediction.label_ids).mean().item()}


def main() -> None:
    """Trains."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    set_seed(0)
    train, test = datasets()
    model = Classifier()
    folder = "runs/transformers_digits"
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=64,
        learning_rate=0.01,
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",  # or "tensorboard", "wandb", ...: they get balance/... as well
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
    )
    callback = BalancingCallback()
    callback.add_to(trainer)
    trainer.train()

    percent = 100 * trainer.evaluate()["eval_accuracy"]
    history = callback.history
    if history is not None and trainer.is_world_process_zero():
        print(f"test accuracy {percent:.1f} %")
        steps = len(history) // options.epochs
        print(f"coefficients in the last epoch: {coefficients(history, steps)}")
        history.plot(Path(folder) / "modulation.png")


if __name__ == "__main__":
    main()
