"""Checks of the modulations beside OGM-GE on many ranks, which the modules of ranks import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mmbal_fast
from mmbal_fast.training import GradientModulation
from tests.distributed.checks import (
    TwoEncoders,
    alone,
    batch_of,
    counted_collectives,
    equal_on_all_ranks,
    parameters_of,
    part_of,
    sharded,
)

Made = Callable[..., GradientModulation]

METHODS: dict[str, Callable[[TwoEncoders, Any], GradientModulation]] = {
    "AGM": lambda net, group: mmbal_fast.AGM(
        net.encoders(),
        alpha=0.5,
        head=net.head,
        widths={"audio": 5, "image": 5},
        process_group=group,
    ),
    "MLB": lambda net, group: mmbal_fast.MLB(net.encoders(), alpha=0.5, process_group=group),
    "metric modulation": lambda net, group: mmbal_fast.MetricModulation(
        net.encoders(), process_group=group
    ),
    "InfoReg": lambda net, group: mmbal_fast.InfoReg(net.encoders(), process_group=group),
}
"""Of each modulation how it is made for a network and a group."""


def train(
    model: nn.Module, method: GradientModulation, part: slice, count: int
) -> tuple[Tensor, dict[str, Any]]:
    """Twelve steps on a part of each batch; coefficients of all steps, and the state."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    coefficients = []
    for step in range(12):
        if step % 4 == 0 and isinstance(method, mmbal_fast.InfoReg):
            method.start_epoch()
        batch, target = part_of(batch_of(step), part)
        optimizer.zero_grad()
        fused, logits = model(batch)
        loss = nn.functional.cross_entropy(fused, target, reduction="sum")
        (count * loss / 8).backward()  # wrappers take the mean over ranks
        coefficients.append(method.step(logits, target).coefficients.clone())
        optimizer.step()
    return torch.stack(coefficients), method.state_dict()


def check_modulations_on_shares_equal_one_process(folder: Path) -> None:
    """Under DDP and FSDP2, with shares of different size: means are of all samples."""
    mine = slice(0, 5) if dist.get_rank() == 0 else slice(5, 8)
    for name, make in METHODS.items():
        one = TwoEncoders()
        single = make(one, alone())
        expected, state = train(one, single, slice(0, 8), 1)
        assert (expected != expected[0]).any(), name
        for wrap in (DistributedDataParallel, sharded):
            net = TwoEncoders()
            method = make(net, None)
            with counted_collectives() as calls:
                found, found_state = train(wrap(net), method, mine, 2)
            assert len([each for each in calls if each[1] == torch.float32]) >= 12
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert equal_on_all_ranks(found), name
            torch.testing.assert_close(parameters_of(net), parameters_of(one), rtol=1e-3, atol=1e-4)
            for key, value in state.items():
                if isinstance(value, Tensor):
                    torch.testing.assert_close(found_state[key], value, rtol=1e-4, atol=1e-5)
            method.check_in_sync()
