"""The same bits on every instruction set, for any number of threads, and every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from mmbal_fast import _backend
from tests.functional.print_hashes import hashes

if TYPE_CHECKING:
    from tests.conftest import Backend

ROOT = Path(__file__).parents[2]
SIZE = 300_000  # for 4 threads: one takes no less than 64 K normals


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """Of one thread, on the instruction set that this process runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = hashes(torch.device("cpu"), SIZE)
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("threads", [2, 7])
def test_thread_counts(cpu: Backend, expected: dict[str, str], threads: int) -> None:
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads
    assert hashes(cpu.device, SIZE) == expected


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.functional.print_hashes"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_instruction_sets(cpu: Backend, expected: dict[str, str]) -> None:
    """Those that this processor has, beside the one that this process runs."""
    assert cpu.native is not None
    isas = cpu.native.cpu_isas()
    assert isas[0] == "baseline"
    for isa in set(isas) - {cpu.native.cpu_isa()}:
        result = run(MMBAL_CPU_ISA=isa)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == {"isa": isa, "hashes": expected}


@pytest.mark.skipif("MMBAL_CPU_ISA" in os.environ, reason="MMBAL_CPU_ISA is set")
def test_the_best_instruction_set_is_chosen(cpu: Backend) -> None:
    assert cpu.native is not None
    assert cpu.native.cpu_isa() == cpu.native.cpu_isas()[-1]


def test_all_native_code(native: Backend, cpu: Backend) -> None:
    """Sums are ordered as suits the hardware, so only noise and what follows from given numbers."""
    mine = hashes(native.device, 9000)
    with _backend.using(cpu.native):
        other = hashes(cpu.device, 9000)
    kinds = ("noise", "scaled") if native.cuda_kernels else ("noise", "scaled", "moments")
    for name in mine:
        if name.startswith(kinds):
            assert mine[name] == other[name], name


def test_every_time(backend: Backend) -> None:
    size = 5000 if backend.native else 50
    assert hashes(backend.device, size) == hashes(backend.device, size)
