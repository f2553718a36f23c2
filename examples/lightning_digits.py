"""Balanced training with Lightning.

    python examples/lightning_digits.py --epochs 3

Needs scikit-learn and ``pip install mmbal-fast[lightning]``; ``--devices 2`` trains on two
processes. Lightning prints its own lines, and this script:

    epoch 1: test accuracy 55.6 %
    ...
    coefficients in the last epoch: gray 0.50, color 0.97

Losses and ``balance/...`` are in ``runs/lightning_digits``, and a plot of the latter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _digits import Net, coefficients, datasets
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import mmbal_fast
from mmbal_fast.integrations.lightning import BalancingCallback


class Classifier(LightningModule):
    """Late fusion of a gray and a colored image."""

    def __init__(self) -> None:
        """The balancer belongs to the module; the callback finds it by its name."""
        super().__init__()
        self.net = Net()
        self.balancer = mmbal_fast.OGMGE(self.net.encoders, alpha=0.5)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Hands over each modality's logits, and returns the loss as ever."""
        gray, color, label = batch
        fused, logits = self.net(gray, color)
        self.balancer.observe(logits, label)
        loss = cross_entropy(fused, label)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Accuracy."""
        gray, color, label = batch
        correct = self.net(gray, color)[0].argmax(dim=1) == label
        self.log("accuracy", correct.float().mean(), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Prints."""
        if not self.trainer.sanity_checking:
            percent = 100 * float(self.trainer.callback_metrics["accuracy"])
            self.print(f"epoch {self.current_epoch + 1}: test accuracy {percent:.1f} %")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    """Trains."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--devices", type=int, default=1)
    options = parser.parse_args()

    seed_everything(0)
    train, test = datasets()
    callback = BalancingCallback()
    logger = CSVLogger("runs", name="lightning_digits")
    trainer = Trainer(
        max_epochs=options.epochs,
        devices=options.devices,
        logger=logger,
        log_every_n_steps=10,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Classifier(),
        DataLoader(train, batch_size=64, shuffle=True),
        DataLoader(test, batch_size=len(test)),
    )
    history = callback.history
    if history is not None and trainer.is_global_zero:
        print(
            f"coefficients in the last epoch: {coefficients(history, trainer.num_training_batches)}"
        )
        history.plot(Path(logger.log_dir) / "modulation.png")


if __name__ == "__main__":
    main()
