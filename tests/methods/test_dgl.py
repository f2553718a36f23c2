"""DGL against the two backward passes of the released code."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

import mmbal_fast
from tests.methods.cases import NAMES, Net, batch_of, filled


def published_step(net: Net, number: int, alpha: float) -> None:
    """Two backward passes: the own losses first, without the fusion; then the fusion alone."""
    batch, target = batch_of(number)
    features = net.features(batch)
    own = [cross_entropy(net.heads[name](features[name]), target) for name in NAMES]
    (alpha * torch.stack(own).sum()).backward()
    for parameter in net.head.parameters():
        parameter.grad = None
    fused = net({name: each.detach() for name, each in features.items()})
    cross_entropy(fused, target).backward()


def test_equals_the_published_two_passes_over_twenty_steps() -> None:
    nets: Any = filled(Net()), filled(Net())
    published, ours = nets
    dgl = mmbal_fast.DGL(NAMES, alpha=4.0)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in (published, ours)]
    for number in range(20):
        for optimizer in optimizers:
            optimizer.zero_grad()
        published_step(published, number, 4.0)
        batch, target = batch_of(number)
        features = ours.features(batch)
        own = {
            name: cross_entropy(ours.heads[name](each), target) for name, each in features.items()
        }
        dgl.loss(cross_entropy(ours(dgl.detached(features)), target), own).backward()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(published.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_no_encoder_learns_from_the_fused_loss() -> None:
    net: Any = filled(Net())
    dgl = mmbal_fast.DGL(NAMES)
    batch, target = batch_of(0)
    cross_entropy(net(dgl.detached(net.features(batch))), target).backward()
    assert all(each.grad is None for each in net.encoders.parameters())
    dgl.enabled = False
    cross_entropy(net(dgl.detached(net.features(batch))), target).backward()
    assert all(each.grad is not None for each in net.encoders.parameters())
