"""MMPareto on two ranks, under DDP and FSDP2: check_* are run by two_ranks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mmbal_fast
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
from tests.host_reads import host_reads


def micro_batches(number: int, everything: bool) -> list[slice]:
    """Two for each optimizer step, of this rank or of all; ranks have shares of different size."""
    if everything:
        return [slice(0, 4), slice(4, 8)]
    cut = 1 if number % 2 else 3
    return [slice(0, cut), slice(4, 4 + cut)] if dist.get_rank() == 0 else [
        slice(cut, 4), slice(4 + cut, 8),
    ]  # fmt: skip


def train(
    model: nn.Module, pareto: mmbal_fast.MMPareto, everything: bool, scaled: bool
) -> list[Tensor]:
    """Eight steps; cosines and weights of all, one of which a scaler skips."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
    world = 1 if everything else dist.get_world_size()
    records = []
    for number in range(8):
        optimizer.zero_grad()
        for position, part in enumerate(micro_batches(number, everything)):
            batch, target = part_of(batch_of(number), part)
            last = position == 1
            if isinstance(model, DistributedDataParallel):  # FSDP2 averages at every one
                model.require_backward_grad_sync = last
            fused, logits = model(batch)
            targets = {"audio": (target + 1) % 3}  # so that the audio encoder's losses conflict
            losses = {
                name: nn.functional.cross_entropy(each, targets.get(name, target), reduction="sum")
                * (world / 8)
                for name, each in {"fused": fused, **logits}.items()
            }
            pareto.backward(losses, grad_scaler=scaler)
        if scaled and number == 5:
            grad: Any = next(model.parameters()).grad
            if not isinstance(grad, DTensor):
                grad.view(-1)[0] = torch.inf
            elif dist.get_rank() == 0:  # a shard that one rank alone holds
                grad.to_local().view(-1)[0] = torch.inf
        records.append(pareto.step(grad_scaler=scaler, optimizer=optimizer).clone())
        scaler.step(optimizer)
        scaler.update()
    return [torch.stack([each.cosines, each.weights]) for each in records]


def check_mmpareto_on_shares_equals_one_process(folder: Path) -> None:
    """Accumulated, with and without a scaler, one of whose steps is skipped."""
    for scaled in (False, True):
        one = TwoEncoders()
        single = mmbal_fast.MMPareto(one.encoders(), process_group=alone())
        expected = torch.stack(train(one, single, True, scaled))
        assert (expected[:, 0] < 0).any()
        assert (expected[:, 0] > 0).any()
        for wrap in (DistributedDataParallel, sharded):
            net = TwoEncoders()
            model = wrap(net)
            method = mmbal_fast.MMPareto(net.encoders())
            found = torch.stack(train(model, method, False, scaled))
            finite = expected.isfinite()
            torch.testing.assert_close(found[finite], expected[finite], rtol=1e-3, atol=1e-4)
            assert equal_on_all_ranks(found.nan_to_num(9.0))
            torch.testing.assert_close(parameters_of(net), parameters_of(one), rtol=1e-3, atol=1e-4)


def check_the_communication_of_mmpareto(folder: Path) -> None:
    """Packed, without a host read: the own gradients under DDP, the dot products under FSDP2."""
    for wrap in (DistributedDataParallel, sharded):
        net = TwoEncoders()
        model = wrap(net)
        method = mmbal_fast.MMPareto(net.encoders())
        method.backward(losses_of(model))
        elements = sum(each.numel() for each in net.parameters()) - 33  # of the head
        with counted_collectives() as calls, host_reads() as reads:
            method.step()
        assert reads == []
        tensors = len(method._groups.names)
        assert calls == [
            ("all_reduce", torch.float64, 3 * tensors)
            if wrap is sharded
            else ("all_reduce", torch.float32, elements)
        ]


def check_mmpareto_refuses_what_fsdp2_has_not_averaged(folder: Path) -> None:
    net = TwoEncoders()
    late = mmbal_fast.MMPareto(net.encoders())  # knows the whole parameters
    model: Any = sharded(net)
    method = mmbal_fast.MMPareto(net.encoders())
    model.set_requires_gradient_sync(False)
    with pytest.raises(RuntimeError, match=r"^MMPareto.backward: FSDP2 must average .*\(got"):
        method.backward(losses_of(model))
    model.set_requires_gradient_sync(True)
    model.zero_grad()
    late.backward(losses_of(model))
    with pytest.raises(RuntimeError, match=r"^MMPareto.step: MMPareto must be made after .*\(got"):
        late.step()
    model.zero_grad()
    late.backward(losses_of(model))
    late.step()


def losses_of(model: nn.Module) -> dict[str, Tensor]:
    batch, target = batch_of(0)
    fused, logits = model(batch)
    named = {"fused": fused, **logits}
    return {name: nn.functional.cross_entropy(each, target) for name, each in named.items()}
