"""Checks of Gradient-Blending on many ranks, which the modules of ranks import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from mmbal_fast import GradientBlending
from tests.distributed.checks import alone, counted_collectives, equal_on_all_ranks


def super_epochs(blending: GradientBlending, share: Callable[[int, str], slice]) -> None:
    """Two, on some samples of each split."""
    for epoch in range(2):
        generator = torch.Generator().manual_seed(epoch)
        target = torch.randint(3, (10,), generator=generator)
        scores = torch.randn(2, 10, 3, generator=generator)
        target[4] = -100
        for split, scale in (("train", 3.0 - epoch), ("validation", 2.0 - epoch)):
            part = share(epoch, split)
            audio, fused = scale * scores[:, part]
            blending.loss({"audio": audio, "fused": fused}, target[part])
            blending.record(split, blending.last)  # type: ignore[arg-type]
        blending.update()


def check_blending_records_are_of_all_ranks(folder: Path) -> None:
    def share(epoch: int, split: str) -> slice:
        first = dist.get_rank() == 0
        if epoch == 0 and split == "validation":  # one rank has all the samples, and the other none
            return slice(0, 10 if first else 0)
        return slice(0, 7) if first else slice(7, 10)

    blending = GradientBlending(["audio", "fused"])
    with counted_collectives() as calls:
        super_epochs(blending, share)
    assert calls == [("all_reduce", torch.float64, 6)] * 2
    single = GradientBlending(["audio", "fused"], process_group=alone())
    with counted_collectives() as calls:
        super_epochs(single, lambda epoch, split: slice(0, 10))
    assert calls == []
    found, wanted = blending.state_dict(), single.state_dict()
    for key in ("weights", "history"):
        tensor = torch.tensor(found[key])
        torch.testing.assert_close(tensor, torch.tensor(wanted[key]), equal_nan=True)
        assert equal_on_all_ranks(tensor.nan_to_num(7.0))
    assert 0 < found["weights"][0] < 1
