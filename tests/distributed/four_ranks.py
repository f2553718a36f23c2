"""Checks for four ranks: see test_ranks.py."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import mmbal_fast
from tests.distributed.checks import (
    WRAPPERS,
    TwoEncoders,
    alone,
    batch_of,
    ddp_equals_one_process,
    equal_on_all_ranks,
    noise_of,
    parameters_of,
    part_of,
    resume_and_compare,
    run_checks,
    share,
    train,
)
from tests.distributed.greedy import (  # noqa: F401  - run with those below
    check_greedy_balancing_resumes_what_two_ranks_saved,
    check_learning_speeds_on_a_mesh_of_two_dimensions,
)


def check_ddp_equals_one_process(folder: Path) -> None:
    ddp_equals_one_process()


def check_resumes_what_two_ranks_saved(folder: Path) -> None:
    for name, wrap in WRAPPERS.items():
        resume_and_compare(folder / name, wrap)


def expected_of_ddp() -> tuple[torch.Tensor, torch.Tensor]:
    ddp = TwoEncoders()
    balancer = mmbal_fast.OGMGE(ddp.encoders(), alpha=0.5)
    coefficients = train(DistributedDataParallel(ddp), balancer, range(10), share)
    return parameters_of(ddp), torch.stack(coefficients)


def check_fsdp2_with_empty_shards_equals_ddp(folder: Path) -> None:
    parameters, coefficients = expected_of_ddp()
    net = TwoEncoders()
    fully_shard(net)
    weight: Any = net.get_parameter("image.0.weight")
    assert weight.to_local().numel() == (0 if dist.get_rank() == 3 else 18)  # 3 rows of 4
    balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5)
    found = train(net, balancer, range(10), share)
    torch.testing.assert_close(torch.stack(found), coefficients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parameters_of(net), parameters, rtol=1e-3, atol=1e-4)


def check_hybrid_sharding_equals_ddp(folder: Path) -> None:
    """Two replicas of two shards: moments are summed over the shards alone."""
    parameters, coefficients = expected_of_ddp()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    net = TwoEncoders()
    fully_shard(net, mesh=mesh)
    balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5)
    found = train(net, balancer, range(10), share)
    torch.testing.assert_close(torch.stack(found), coefficients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parameters_of(net), parameters, rtol=1e-3, atol=1e-4)
    assert equal_on_all_ranks(parameters_of(net))


class Wide(TwoEncoders):
    """Its sizes divide by the ranks, as FSDP2 over tensor parallelism asks."""

    def __init__(self) -> None:
        super().__init__()
        self.audio = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)
        )


def check_fsdp2_over_tensor_parallel_equals_one_process(folder: Path) -> None:
    """Rows of one layer are sharded twice, columns of the other once and its rows once."""
    one = Wide()
    single = mmbal_fast.OGMGE(one.encoders(), alpha=0.5, process_group=alone())
    expected = train(one, single, range(10), batch_of)
    net = Wide()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(net.audio, mesh["model"], plan)
    for module in (net.audio, net.image, net):
        fully_shard(module, mesh=mesh["data"])
    group = mesh["data"].get_group()
    balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5, process_group=group)
    assert any(
        "_StridedShard" in repr(getattr(each, "placements", None)) for each in net.parameters()
    )
    half = mesh["data"].get_local_rank()

    def batches(step: int):
        return part_of(batch_of(step), slice(4 * half, 4 * half + 4))

    found = train(net, balancer, range(10), batches)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parameters_of(net), parameters_of(one), rtol=1e-3, atol=1e-4)


def check_noise_on_a_mesh_of_two_dimensions(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    for shape in [(7, 5), (1, 9), (5, 3, 2, 2), (3, 4)]:
        for placements in (
            [Shard(0), Shard(1)],
            [Shard(1), Shard(0)],
            [Shard(0), Shard(0)],
            [Shard(1), Shard(1)],
            [Replicate(), Shard(1)],
            [Shard(0), Replicate()],
        ):
            sharded = distribute_tensor(torch.zeros(shape), mesh, placements)
            found, expected = noise_of(torch.zeros(shape), sharded, "weight")
            assert torch.equal(found, expected), (shape, placements)


def step_often(balancer: mmbal_fast.OGMGE, logits: dict[str, torch.Tensor]) -> None:
    for _ in range(10):  # who is far from the dead rank in the ring notices later
        balancer.step(logits, share(2)[1])


def check_the_others_fail_where_a_rank_dies(folder: Path) -> None:
    """With torch's own error and at once. The last check: nobody can go on after it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of who started the ranks; would hide the error
    net = TwoEncoders()
    balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5)
    model = DistributedDataParallel(net)
    train(model, balancer, range(2), share)
    if dist.get_rank() == 3:
        sys.exit()
    _, logits = net(share(2)[0])
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="gloo"):
        step_often(balancer, logits)
    assert time.monotonic() - began < 60


if __name__ == "__main__":
    run_checks(globals())
