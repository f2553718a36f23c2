"""What each of two ranks trains: see test_two_ranks.py."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.integrations import training

PER_RANK = training.BATCH // 2


def train_lightning(folder: Path) -> dict[str, Any]:
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader, DistributedSampler

    from mmbal_fast.integrations.lightning import BalancingCallback
    from tests.integrations.test_lightning import Module, Sink

    module, callback, sink = Module(), BalancingCallback(), Sink()
    trainer = Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        devices=2,
        strategy="ddp",
        accelerator="cpu",
        use_distributed_sampler=False,  # Lightning's shuffles
        logger=sink,
        log_every_n_steps=2,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = training.Digits()
    sampler: DistributedSampler[Any] = DistributedSampler(
        data, 2, int(os.environ["RANK"]), shuffle=False
    )
    trainer.fit(module, DataLoader(data, PER_RANK, sampler=sampler))
    return {
        "parameters": training.parameters(module.net),
        "table": training.table(callback.history),
        "logged": [step for step, row in sink.rows.items() if "balance/ratios/gray" in row],
    }


def train_transformers(folder: Path) -> dict[str, Any]:
    from mmbal_fast.integrations.transformers import BalancingCallback
    from tests.integrations.test_transformers import make_trainer

    net, callback = training.Net(), BalancingCallback()
    trainer = make_trainer(
        net,
        folder,
        callback,
        per_device_train_batch_size=PER_RANK,
        gradient_accumulation_steps=2,
        logging_steps=2,
    )
    trainer.train()
    rows = trainer.state.log_history
    return {
        "parameters": training.parameters(net),
        "table": training.table(callback.history),
        "logged": [row["step"] - 1 for row in rows if "balance/ratios/gray" in row],
    }


def train_accelerate(folder: Path) -> dict[str, Any]:
    from tests.integrations import recipes

    names = recipes.run_accelerate(batch_size=PER_RANK)
    model, balancer = names["accelerator"].unwrap_model(names["model"]), names["balancer"]
    last = torch.stack([balancer.last.scores, balancer.last.ratios, balancer.last.coefficients])
    return {"parameters": training.parameters(model), "table": last}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        result = globals()[f"train_{name}"](folder)
        torch.save(result, folder / f"{name}.{os.environ['RANK']}.pt")
    if dist.is_initialized():
        dist.barrier()  # as in examples/ddp_digits.py
        dist.destroy_process_group()
