"""Checks for a single rank: see test_ranks.py."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import mmbal_fast
from tests.distributed.checks import (
    WRAPPERS,
    TwoEncoders,
    batch_of,
    counted_collectives,
    ddp_equals_one_process,
    parameters_of,
    resume_and_compare,
    run_checks,
    share,
    train,
)
from tests.distributed.greedy import (  # noqa: F401  - run with those below
    check_greedy_balancing_resumes_what_two_ranks_saved,
)


def check_ddp_equals_one_process(folder: Path) -> None:
    ddp_equals_one_process()


def check_resumes_what_two_ranks_saved(folder: Path) -> None:
    for name, wrap in WRAPPERS.items():
        resume_and_compare(folder / name, wrap)


def check_a_world_of_one_is_the_plain_process(folder: Path) -> None:
    """Bit for bit, wrapped in anything, without a collective of its own."""
    net = TwoEncoders()
    balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5)
    with counted_collectives() as calls:
        train(net, balancer, range(5), batch_of)
    assert calls == []
    assert balancer._group is None
    ddp, fsdp = TwoEncoders(), TwoEncoders()
    train(
        DistributedDataParallel(ddp), mmbal_fast.OGMGE(ddp.encoders(), alpha=0.5), range(5), share
    )
    assert torch.equal(parameters_of(ddp), parameters_of(net))
    fully_shard(fsdp)
    train(fsdp, mmbal_fast.OGMGE(fsdp.encoders(), alpha=0.5), range(5), share)
    torch.testing.assert_close(parameters_of(fsdp), parameters_of(net))


def check_flat_parameters_are_refused(folder: Path) -> None:
    for use_orig_params in (True, False):
        flatten = partial(
            FullyShardedDataParallel,
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
        )
        for one_by_one in (True, False):
            net = TwoEncoders()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if one_by_one:
                    net.audio = flatten(net.audio)  # type: ignore[assignment]
                else:
                    flatten(net)
            with pytest.raises(TypeError, match=r"'audio' must not be .*use .*fully_shard"):
                mmbal_fast.OGMGE(net.encoders(), alpha=0.5)
            with pytest.raises(TypeError, match=r"\['audio'\] must not be .*use .*fully_shard"):
                mmbal_fast.ConditionalLearningSpeed(
                    main=net.encoders(), bypass={name: net.head for name in net.encoders()}
                )


if __name__ == "__main__":
    run_checks(globals())
