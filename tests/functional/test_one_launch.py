"""CUDA: moments and update in one launch give what two launches give."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from mmbal_fast import _backend
from mmbal_fast.functional._modulate import update_

if TYPE_CHECKING:
    from tests.conftest import Backend

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CHUNK = 4096  # of csrc/math/moments.h
WAVE = 8192  # float32 elements that are measured before they are updated, under emulation
COUNTERS = 4 * (792 + 2)  # bytes at the start of a workspace
SIZES_AT_WAVES = {
    "one": [1],
    "a chunk": [CHUNK],
    "a wave": [WAVE],
    "more than a wave": [WAVE + 1],
    "two that make a wave": [CHUNK, CHUNK],
    "two that do not": [CHUNK, CHUNK + 1],
    "small ones around a large one": [5, 3 * WAVE + 7, 9],
    "ragged": [1, CHUNK - 1, 2, WAVE - 3, CHUNK + 1, 3, 2 * CHUNK, WAVE + CHUNK, 17],
    "as many waves as few tensors may": [WAVE] * 16,
    "a wave more": [WAVE] * 17,
    "many waves of small ones": [CHUNK // 2 + i % 3 for i in range(93)],
    "more tensors than few": [300 + 61 * i for i in range(97)],
    "more tensors than fit": [1 + i % 7 for i in range(801)],
    "more waves than many tensors may": [WAVE // 3 * 2] * 70 + [3] * 30,
}

ORDERS = [{}, {"BLOCKS": "8"}, {"SEED": "3", "BLOCKS": "5"}]  # of blocks, under emulation


@pytest.mark.parametrize("native", ["cuda-emulated", "cuda"], indirect=True)
@pytest.mark.parametrize("sizes", SIZES_AT_WAVES.values(), ids=SIZES_AT_WAVES)
@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_one_launch_equals_two(
    native: Backend,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int],
    unscales: bool,
    order: dict[str, str],
) -> None:
    for name, value in order.items():
        monkeypatch.setenv(f"MMBAL_EMULATION_{name}", value)
    grads = [
        torch.randn(size).to(native.device, DTYPES[i % len(DTYPES)]) for i, size in enumerate(sizes)
    ]
    grads[-1][-1] = math.inf
    results = []
    for in_one_launch in (False, True):
        mine = [grad.clone() for grad in grads]
        status = torch.zeros(1, dtype=torch.int32, device=native.device)
        counter = torch.tensor([7], device=native.device)
        found = torch.zeros((), device=native.device)
        with _backend.using(native.native, in_one_launch=in_one_launch):
            for _ in range(2):
                update_(
                    mine,
                    torch.tensor([0.5, 1.0], device=native.device),
                    [i % 2 for i in range(len(sizes))],
                    step=counter,
                    status=status,
                    advance=True,
                    inverse_scale=torch.tensor(0.3, device=native.device) if unscales else None,
                    found_inf=found if unscales else None,
                )
                (workspace,) = _backend._kept.workspaces.values()
                assert not workspace[:COUNTERS].any()
        results.append([*mine, status, counter, found])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    assert results[0][-2].item() == 9
