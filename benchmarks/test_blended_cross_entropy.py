"""The blended loss, forward and backward, against the sum of cross-entropies it stands for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmbal_fast import functional

WEIGHTS = [0.5, 0.2, 0.3]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fused(logits, target, weights):
    return functional.blended_cross_entropy(logits, target, weights)[0]


def plain(logits, target, weights):
    losses = [F.cross_entropy(each, target) for each in logits]
    return sum(w * each for w, each in zip(WEIGHTS, losses, strict=True))


PROVIDERS = {"fused": fused, "plain": plain, "compiled": plain}


@pytest.mark.parametrize("classes", [6, 310, 21_000])
@pytest.mark.parametrize("batch", [64, 4096])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_and_backward(benchmark, provider, batch, classes):
    if batch * classes > 2**24 and DEVICE == "cpu":
        pytest.skip("gigabytes of memory")
    benchmark.group = f"3 heads, batch {batch}, {classes} classes, {DEVICE}"
    loss = PROVIDERS[provider]
    if provider == "compiled":
        loss = torch.compile(loss, dynamic=False)
    logits = [torch.randn(batch, classes, device=DEVICE, requires_grad=True) for _ in WEIGHTS]
    target = torch.randint(classes, (batch,), device=DEVICE)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64, device=DEVICE)

    def run():
        loss(logits, target, weights).backward()
        for each in logits:
            each.grad = None
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(
        run, rounds=15, iterations=max(1, 2**20 // (batch * classes)), warmup_rounds=3
    )
