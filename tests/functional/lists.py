"""What the tests of operations on lists of tensors share."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.conftest import Backend

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CHUNK = 4096  # of csrc/math/moments.h
SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 65, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 61]


def split(device: torch.device, dtype: torch.dtype, count: int) -> list[list[Tensor]]:
    """Lists of tensors of `SIZES` beside each other in memory, of standard normals."""
    made = torch.randn(count, sum(SIZES), dtype=torch.float64).to(device, dtype)
    return [list(each.split(SIZES)) for each in made]


def layouts(base: Tensor) -> dict[str, Tensor]:
    """Four-dimensional ``base`` in every layout."""
    return {
        "contiguous": base.clone(),
        "channels_last": base.clone().to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 3)
        .clone(memory_format=torch.contiguous_format)
        .transpose(0, 3),
        "sliced": torch.stack([base, base], dim=-1)[..., 1],
        "negated": torch._neg_view(-base),
        "shifted": torch.cat([base.new_zeros(1), base.flatten()])[1:].view(base.shape),
    }


_PROGRAM = """
import sys, torch
from mmbal_fast import _backend, functional
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[1]))
made = torch.randn(4, 3, 20 * 4096 + 3, dtype=torch.float64)
def lists(count, dtype):
    return [[each[i].to(dtype) for each in made] for i in range(count)]
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    {run}
    bits = [each.double().view(torch.int64).sum().item() for each in results]
    print(_backend.native.cpu_isa() == sys.argv[2], bits)
"""


def same_bits_everywhere(cpu: Backend, run: str) -> None:
    """Runs lines that make ``results`` for each ``dtype``, by all instruction sets and threads."""
    assert cpu.native is not None
    outputs = set()
    for threads, isa in enumerate(cpu.native.cpu_isas(), start=1):
        environment = os.environ | {"MMBAL_CPU_ISA": isa}
        program = [sys.executable, "-c", _PROGRAM.format(run=run.strip()), str(threads), isa]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.count("True") == 4
        outputs.add(done.stdout)
    assert len(outputs) == 1
