"""Checks of greedy balancing on many ranks, which the modules of ranks import."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from mmbal_fast import ConditionalLearningSpeed, GreedyBalancing, conditional_utilization
from mmbal_fast.nn import MMTM
from tests.distributed.checks import (
    alone,
    counted_collectives,
    equal_on_all_ranks,
    refusal_where_rank_1_has,
    uninitialized,
)
from tests.host_reads import host_reads

OPTIONS: dict[str, Any] = {"warmup_steps": 2, "epsilon": 0.05, "window": 2, "log_size": 32}


class Net(nn.Module):
    """Two branches with an MMTM between their layers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image = nn.ModuleList([nn.Linear(5, 3), nn.Linear(3, 2)])
        self.audio = nn.ModuleList([nn.Linear(4, 7), nn.Linear(7, 2)])
        self.mmtm = MMTM([3, 7])

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        x, y = self.mmtm(self.image[0](x), self.audio[0](y))
        return {"image": self.image[1](x), "audio": self.audio[1](y)}


def batch_of(step: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(size, 5, generator=generator), torch.randn(size, 4, generator=generator)
    return x, y, (x[:, 0] + y[:, 0] > 0).long()


def backward(model: nn.Module, batch: Iterable[Tensor]) -> None:
    x, y, target = batch
    model.zero_grad()
    logits = model(x, y).values()
    torch.stack([nn.functional.cross_entropy(each, target) for each in logits]).sum().backward()


def train(
    model: nn.Module, balancing: GreedyBalancing, steps: range = range(12), *, shared: bool
) -> None:
    """On this rank's part of each batch, or on the whole of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    count = 8 // dist.get_world_size()
    part = slice(count * dist.get_rank(), count * dist.get_rank() + count)
    for step in steps:
        backward(model, (each[part] if shared else each for each in batch_of(step)))
        balancing.step()
        optimizer.step()


def net_of_all_ranks(seed: int = 0) -> Net:
    """Its averages are of all ranks' samples, so that windows do what they do in one process."""
    net = Net(seed)
    net.mmtm.process_group = dist.group.WORLD
    return net


def check_mmtm_averages_are_of_all_ranks_on_request(folder: Path) -> None:
    first, second = MMTM([3, 2]), MMTM([3, 2], process_group=dist.group.WORLD)
    second.load_state_dict(first.state_dict())
    for mine, other in [(3, 5), (1, 0), (4, 4)]:
        x, y = torch.randn(2, 9, 3)[:, : mine + other].unbind(0)
        y = y[:, :2]
        with counted_collectives() as calls:
            part = slice(0, mine) if dist.get_rank() == 0 else slice(mine, mine + other)
            second(x[part], y[part])
        assert calls == [("all_reduce", torch.float32, 2 * 5 + 1)]  # squeezes, gates, samples
        with counted_collectives() as calls:
            first(x, y)
        assert calls == []
        assert second.num_samples == first.num_samples
        torch.testing.assert_close(second.running_gate, first.running_gate)
        torch.testing.assert_close(second.running_squeeze, first.running_squeeze)
    before = second.running_gate.clone()
    second(torch.full((2, 3), torch.nan if dist.get_rank() == 1 else 1.0), torch.ones(2, 2))
    assert torch.equal(second.running_gate, before)


def check_greedy_balancing_under_ddp_equals_one_process(folder: Path) -> None:
    one, net = Net(), net_of_all_ranks()
    single = GreedyBalancing(one, process_group=alone(), **OPTIONS)
    train(one, single, shared=False)
    model = DistributedDataParallel(net)
    balancing = GreedyBalancing(model, **OPTIONS)
    train(model, balancing, shared=True)
    assert balancing.names == ("image", "audio")
    assert balancing.log.decision.max() >= 0
    assert torch.equal(balancing.log.rebalanced, single.log.rebalanced)
    torch.testing.assert_close(balancing.log.speed, single.log.speed, rtol=1e-4, atol=1e-4)
    assert equal_on_all_ranks(balancing.log.speed)


def check_ranks_with_other_gradients_decide_alike(folder: Path) -> None:
    """Where a training averages parameters and not gradients; each rank by itself would differ."""
    net, own = Net(), []
    balancing = GreedyBalancing(net, **OPTIONS)
    by_itself = ConditionalLearningSpeed.from_model(net, process_group=alone())
    for step in range(4):
        backward(net, batch_of(10 * step + dist.get_rank()))
        by_itself.update()
        balancing.step()
        own.append(by_itself.speed)
    assert not equal_on_all_ranks(torch.stack(own))
    if dist.get_rank() == 1:  # nor does a rank without any keep the others waiting
        net.zero_grad()
    balancing.step()
    assert len(balancing.log.speed) == 5
    assert equal_on_all_ranks(balancing.log.speed)
    assert equal_on_all_ranks(balancing.log.decision)


def check_greedy_balancing_in_sync_names_what_differs(folder: Path) -> None:
    for attribute, value, what in [
        ("epsilon", 0.5, "hash of warmup_steps and epsilon and window"),
        ("names", ("a", "b"), "hash of the names"),
        ("enabled", False, r"enabled \[1, 0\]"),
        ("_remaining", torch.tensor([2]), r"steps left of the window \[0, 2\]"),
        ("_branch", torch.tensor([1]), r"branch of the window, from 1 \[0, 2\]"),
        ("_step", torch.tensor([5]), r"step \[1, 5\]"),
    ]:
        net = Net()
        balancing = GreedyBalancing(net, **OPTIONS)
        backward(net, batch_of(dist.get_rank()))
        balancing.step()
        assert "speeds" not in refusal_where_rank_1_has(balancing, attribute, value, what)
        balancing.learning_speed.reset()
        if dist.get_rank() == 1:
            balancing.learning_speed._totals += 1.0
        with pytest.raises(RuntimeError, match="hash of the learning speeds"):
            balancing.check_in_sync()


def check_the_communication_of_greedy_balancing(folder: Path) -> None:
    """One all-reduce of a squared norm for every weight and every gradient; no host read."""
    net = Net()
    balancing = GreedyBalancing(DistributedDataParallel(net), **OPTIONS)
    count = len(list(net.parameters()))
    with counted_collectives() as calls:
        train(net, balancing, range(3), shared=True)
    assert calls == [("all_reduce", torch.float64, 2 * count)] * 3
    with host_reads() as found:
        balancing.step()
    assert found == []
    single = GreedyBalancing(net, process_group=alone(), **OPTIONS)
    with counted_collectives() as calls:
        train(net, single, range(3), shared=True)
    assert calls == []


def check_greedy_balancing_joins_at_its_first_step(folder: Path) -> None:
    net, rank = Net(), dist.get_rank()
    with uninitialized():
        late = ConditionalLearningSpeed.from_model(net)
        balancing = GreedyBalancing(net, warmup_steps=rank)
    with pytest.raises(RuntimeError, match="hash of warmup_steps and epsilon and window"):
        balancing.check_in_sync()
    early = ConditionalLearningSpeed.from_model(net)
    backward(net, batch_of(dist.get_rank()))
    late.update()
    early.update()
    assert torch.equal(late.speed, early.speed)
    assert equal_on_all_ranks(late.speed)


def speeds_of(model: nn.Module, group: dist.ProcessGroup | None = None) -> Tensor:
    """After two steps on batches that are the same on all ranks."""
    measure = ConditionalLearningSpeed.from_model(model, process_group=group)
    for step in range(2):
        backward(model, batch_of(step))
        measure.update()
    return measure.speed


def check_learning_speeds_are_of_the_whole_parameters(folder: Path) -> None:
    whole = speeds_of(Net(), alone())
    torch.testing.assert_close(speeds_of(Net()), whole, rtol=1e-5, atol=1e-6)
    sharded = Net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(sharded.audio[0], mesh=mesh)  # 7 rows: unevenly; the rest stays replicated
    fully_shard(sharded.mmtm.squeeze, mesh=mesh)
    torch.testing.assert_close(speeds_of(sharded), whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"all ranks .*\(got ranks \[\d\] for \[5, 10\] on .*\[0, 1"
    ):
        ConditionalLearningSpeed.from_model(sharded, process_group=alone())


def check_learning_speeds_on_a_mesh_of_two_dimensions(folder: Path) -> None:
    """Shards in two replicas; and rows of a layer sharded twice, by FSDP2 over tensor parallel."""
    whole = speeds_of(Net(), alone())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    hybrid = Net()
    fully_shard(hybrid, mesh=mesh)
    torch.testing.assert_close(speeds_of(hybrid), whole, rtol=1e-5, atol=1e-6)

    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.audio = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 2)])
            self.mmtm = MMTM([3, 8])

    expected = speeds_of(Wide(), alone())
    net = Wide()
    plan = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(net.audio[0], mesh["model"], plan)
    fully_shard(net, mesh=mesh["data"])
    assert any("_StridedShard" in repr(getattr(p, "placements", "")) for p in net.parameters())
    torch.testing.assert_close(speeds_of(net), expected, rtol=1e-5, atol=1e-6)


def check_learning_speeds_of_sums_that_are_still_to_be_taken(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.randn(6, 4)
    speeds = []
    for partial in (False, True):
        parameters = [nn.Parameter(torch.ones(2)) for _ in range(4)]
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        tensor = torch.ones(6, 4)
        gradient = whole
        if partial:
            part = whole * (0.25 + 0.5 * dist.get_rank())
            gradient = DTensor.from_local(part, mesh, [Partial()])
            tensor = DTensor.from_local(tensor, mesh, run_check=False)
        parameters[2] = nn.Parameter(tensor)
        parameters[2].grad = gradient
        a, b, c, d = parameters
        measure = ConditionalLearningSpeed(main={"x": a, "y": b}, bypass={"x": c, "y": d})
        measure.update()
        speeds.append(measure.speed)
    torch.testing.assert_close(speeds[1], speeds[0])


def check_utilization_is_of_all_data_on_request(folder: Path) -> None:
    model = Net()
    train(model, GreedyBalancing(model, warmup_steps=20), shared=False)
    batches = [batch_of(100, size=30), batch_of(101, size=2), batch_of(102, size=30)]
    batches[1][0].add_(20.0)  # a mean over ranks that ignores their sizes would be far off
    batches[1][1].sub_(20.0)
    with counted_collectives() as calls:
        single = conditional_utilization(model, batches)
    assert calls == []
    group = dist.group.WORLD
    part = batches[dist.get_rank() :: 2]
    both = conditional_utilization(copy.deepcopy(model), part, process_group=group)
    assert torch.equal(both.accuracy, single.accuracy)
    assert torch.equal(both.accuracy_without.nan_to_num(), single.accuracy_without.nan_to_num())
    assert single.accuracy.min() > 0.5


def check_greedy_balancing_saves_and_resumes(folder: Path) -> None:
    """In an open window; what is saved here is loaded on one rank and on four."""
    net = net_of_all_ranks()
    balancing = GreedyBalancing(net, **OPTIONS)
    assert isinstance(balancing, Stateful)
    model = DistributedDataParallel(net)
    train(model, balancing, range(6), shared=True)
    assert net.mmtm.average_gate.any()
    state = {"model": net.state_dict(), "balancing": balancing}
    dcp.save(state, checkpoint_id=folder / "greedy")
    train(model, balancing, range(6, 12), shared=True)
    if dist.get_rank() == 0:
        torch.save([net.state_dict(), list(balancing.log)], folder / "greedy.pt")
    resumed = resumed_greedy(folder)
    for one, other in zip(resumed.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other)


def check_greedy_balancing_resumes_what_two_ranks_saved(folder: Path) -> None:
    resumed_greedy(folder)


def resumed_greedy(folder: Path) -> Net:
    """Goes on where the checkpoint of two ranks was taken, and ends where they did."""
    net = net_of_all_ranks(seed=1)
    balancing = GreedyBalancing(net, **OPTIONS)
    state = {"model": net.state_dict(), "balancing": balancing}
    dcp.load(state, checkpoint_id=folder / "greedy")
    assert net.mmtm.average_gate.any()
    train(DistributedDataParallel(net), balancing, range(6, 12), shared=True)
    expected, log = torch.load(folder / "greedy.pt")
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    for found, wanted in zip(balancing.log, log, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    return net
