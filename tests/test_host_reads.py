"""The counter of host reads finds every way to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.host_reads import host_reads


def test_finds_every_way_to_read() -> None:
    tensor = torch.ones(3)
    ways: list[Callable[[], Any]] = [
        lambda: tensor.sum().item(),
        lambda: bool(tensor.any()),
        lambda: float(tensor[0]),
        lambda: tensor.tolist(),
        lambda: tensor.numpy(),
        lambda: tensor.cpu(),
        lambda: torch.equal(tensor, tensor),
        lambda: tensor.nonzero(),
        lambda: 1.0 in tensor,
        lambda: [0, 1, 2][tensor[0].long()],
    ]
    for way in ways:
        with host_reads() as found:
            way()
        assert found


def test_finds_nothing_where_nothing_is_read() -> None:
    tensor = torch.ones(3)
    with host_reads() as found:
        torch.where(tensor > 0, tensor, 0.0).sum().mul_(2)
    assert found == []
