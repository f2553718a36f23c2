"""Results do not depend on what torch does with subnormal numbers, in whichever thread."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from mmbal_fast import functional
from tests.functional.print_hashes import digest

if TYPE_CHECKING:
    from tests.conftest import Backend


@pytest.fixture
def flushing() -> Iterator[None]:
    """Those threads that are there before do not hear of it."""
    torch.set_num_threads(4)
    torch.ones(1_000_000).mul_(2)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    yield
    torch.set_flush_denormal(False)


@functools.cache
def gradients(dtype: torch.dtype, size: int) -> list[Tensor]:
    """Numbers that are subnormal, or become it; made while torch keeps them."""
    generator = torch.Generator().manual_seed(0)
    normals = torch.randn(size, generator=generator, dtype=torch.float64)
    return [(normals * scale * torch.finfo(dtype).tiny).to(dtype) for scale in (0.1, 3)]


def results(dtype: torch.dtype, size: int) -> str:
    found = []
    for grad in gradients(dtype, size):
        scaled, updated = grad.clone(), grad.clone()
        functional.modulate_([scaled], torch.tensor([0.3]), [0], noise=0.0)
        functional.modulate_([updated], torch.tensor([0.3]), [0], eps=0.0)
        found += [functional.gradient_moments([grad]), scaled, updated]
    return digest(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_subnormal_numbers(
    native: Backend, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    size = 5000 if native.emulated else 1_000_000  # enough for several threads
    expected = results(dtype, size)
    request.getfixturevalue("flushing")
    assert [results(dtype, size) for _ in range(3)] == [expected] * 3


def test_the_mode_of_the_caller_is_kept(cpu: Backend, flushing: None) -> None:
    tiny = torch.tensor([1e-40])
    functional.modulate_([tiny.clone()], torch.tensor([0.5]), [0])
    assert (tiny * 1.0).item() == 0.0
