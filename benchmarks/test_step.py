"""The whole step under pytest-benchmark: ``pytest benchmarks``, or ``make bench`` for the table."""

from __future__ import annotations

import pytest
import torch

from mmbal_fast.bench._providers import OURS, PLAIN, PUBLISHED, step
from mmbal_fast.bench._workloads import GRADIENTS


@pytest.mark.parametrize("noise", [True, False], ids=["noise", "no-noise"])
@pytest.mark.parametrize("provider", [OURS, PLAIN, PUBLISHED])
@pytest.mark.benchmark(group="av-resnet18 float32")
def test_av_resnet18(benchmark, provider, noise):
    providers = step(
        GRADIENTS["av-resnet18"], torch.float32, torch.device("cpu"), noise, compiled=False
    )
    chosen = next(each for each in providers if each.name == provider)
    benchmark.pedantic(chosen.run, setup=chosen.restore, rounds=7, warmup_rounds=2)
