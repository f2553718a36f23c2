"""Greedy balancing on two ranks equals one process with all the data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from mmbal_fast.methods import ConditionalLearningSpeed, GreedyBalancing, conditional_utilization
from mmbal_fast.nn import MMTM

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


class Net(nn.Module):
    """Two branches with an MMTM between their layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.ModuleList([nn.Linear(5, 3), nn.Linear(3, 2)])
        self.audio = nn.ModuleList([nn.Linear(4, 7), nn.Linear(7, 2)])
        self.mmtm = MMTM([3, 7])

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        x, y = self.mmtm(self.image[0](x), self.audio[0](y))
        return {"image": self.image[1](x), "audio": self.audio[1](y)}


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(size, 5, generator=generator), torch.randn(size, 4, generator=generator)
    return x, y, (x[:, 0] + y[:, 0] > 0).long()


def train(model: nn.Module, balancing: GreedyBalancing, part: slice) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(12):
        x, y, target = (each[part] for each in batch(step))
        optimizer.zero_grad()
        logits = model(x, y).values()
        torch.stack([nn.functional.cross_entropy(each, target) for each in logits]).sum().backward()
        balancing.step()
        optimizer.step()


def averages_are_of_all_ranks(rank: int) -> None:
    one, both = MMTM([3, 2]), MMTM([3, 2], process_group=dist.group.WORLD)
    both.load_state_dict(one.state_dict())
    for step, (first, second) in enumerate([(3, 5), (1, 0), (4, 4)]):
        x, y = torch.randn(2, 9, 3)[:, : first + second].unbind(0)
        y = y[:, :2]
        both(x[:first], y[:first]) if rank == 0 else both(x[first:], y[first:])
        one(x, y)
        assert both.num_samples == one.num_samples, step
        torch.testing.assert_close(both.running_gate, one.running_gate)
        torch.testing.assert_close(both.running_squeeze, one.running_squeeze)
    before = both.running_gate.clone()
    both(torch.full((2, 3), torch.nan if rank == 1 else 1.0), torch.ones(2, 2))
    assert torch.equal(both.running_gate, before)


def ddp_needs_no_process_group(rank: int) -> None:
    options: dict[str, Any] = {"warmup_steps": 2, "epsilon": 0.05, "window": 2}
    one = Net()
    single = GreedyBalancing(one, **options)
    train(one, single, slice(None))
    net = Net()
    net.mmtm.process_group = dist.group.WORLD
    both = DistributedDataParallel(net)
    balancing = GreedyBalancing(both, **options)
    train(both, balancing, slice(4 * rank, 4 * rank + 4))
    assert balancing.branch_names == ("image", "audio")
    assert balancing.log.decision.max() >= 0
    assert torch.equal(balancing.log.rebalanced, single.log.rebalanced)
    torch.testing.assert_close(balancing.log.speed, single.log.speed, rtol=1e-4, atol=1e-4)
    logs = [torch.empty_like(balancing.log.speed) for _ in range(2)]
    dist.all_gather(logs, balancing.log.speed)
    assert torch.equal(logs[0], logs[1])


def norms_are_of_the_whole_parameters(rank: int) -> None:
    whole, sharded, replicated = Net(), Net(), Net()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(sharded.audio[0], mesh=mesh)  # 7 rows: unevenly; the rest stays replicated
    fully_shard(sharded.mmtm.squeeze, mesh=mesh)
    speeds = []
    world = dist.group.WORLD
    for model, group in [(whole, None), (sharded, world), (replicated, world)]:
        measure = ConditionalLearningSpeed.from_model(model, process_group=group)
        for step in range(2):
            model.zero_grad()
            logits = model(*batch(step)[:2]).values()
            torch.stack([each.square().mean() for each in logits]).sum().backward()
            measure.update()
        speeds.append(measure.speed)
    torch.testing.assert_close(speeds[1], speeds[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(speeds[2], speeds[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"need process_group= \(got a DTensor \[5, 10\]"):
        ConditionalLearningSpeed.from_model(sharded)


def utilization_is_of_all_data(rank: int) -> None:
    model = Net()
    train(model, GreedyBalancing(model, warmup_steps=20), slice(None))
    batches = [batch(100, size=30), batch(101, size=2), batch(102, size=30)]
    batches[1][0].add_(20.0)  # a mean over ranks that ignores their sizes would be far off
    batches[1][1].sub_(20.0)
    single = conditional_utilization(model, batches)
    group = dist.group.WORLD
    both = conditional_utilization(copy.deepcopy(model), batches[rank::2], process_group=group)
    assert torch.equal(both.accuracy, single.accuracy)
    assert torch.equal(both.accuracy_without.nan_to_num(), single.accuracy_without.nan_to_num())
    assert single.accuracy.min() > 0.5


def work(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for check in (
        averages_are_of_all_ranks,
        ddp_needs_no_process_group,
        norms_are_of_the_whole_parameters,
        utilization_is_of_all_data,
    ):
        torch.manual_seed(0)
        check(rank)
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    spawn(work, args=(str(tmp_path / "store"),), nprocs=2)
