"""The ways to save and load what has a `state_dict`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.stateful import Stateful


def saved_by_torch(balancer: Any, folder: Path) -> Callable[[Any], None]:
    buffer = io.BytesIO()
    torch.save(balancer.state_dict(), buffer)
    buffer.seek(0)
    return lambda other: other.load_state_dict(torch.load(buffer, weights_only=True))


def saved_by_distributed_checkpoint(balancer: Any, folder: Path) -> Callable[[Any], None]:
    assert isinstance(balancer, Stateful)
    with pytest.warns(UserWarning, match="in a single process"):
        dcp.save({"balancer": balancer}, checkpoint_id=folder, no_dist=True)

    def load(other: Any) -> None:
        with pytest.warns(UserWarning, match="in a single process"):
            dcp.load({"balancer": other}, checkpoint_id=folder, no_dist=True)

    return load


def saved_by_accelerate(balancer: Any, folder: Path) -> Callable[[Any], None]:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.register_for_checkpointing(balancer)
    accelerator.save_state(str(folder))

    def load(other: Any) -> None:
        again = accelerate.Accelerator(cpu=True)
        again.register_for_checkpointing(other)
        again.load_state(str(folder))

    return load


SAVES = [saved_by_torch, saved_by_distributed_checkpoint, saved_by_accelerate]
"""Each saves its first argument and gives a function that loads into another object."""
