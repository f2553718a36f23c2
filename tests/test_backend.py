"""Which code runs, and what the user hears of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import torch

from mmbal_fast import _backend, functional

if TYPE_CHECKING:
    from tests.conftest import Backend

ROOT = Path(__file__).parents[1]

# Loads the package, computes with it, prints which code did.
USE = """
import torch, mmbal_fast
from mmbal_fast import _backend, functional, reference
grad = torch.randn(50)
twin = grad.clone()
functional.modulate_([grad], torch.tensor([0.5]), [0])
reference.modulate_([twin], torch.tensor([0.5]), [0])
assert torch.allclose(grad, twin, atol=1e-5)
import mmbal_fast.functional, mmbal_fast.cli
print(_backend.why_not)
"""

# As on a machine where the build was skipped (ModuleNotFoundError) or went wrong.
HOOK = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mmbal_fast._C":
            raise {error}
sys.meta_path.insert(0, Finder())
"""


def run(program: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MMBAL_")}
    return subprocess.run(
        [sys.executable, *options, "-c", program],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_native_code_runs_without_a_word(cpu: Backend) -> None:
    result = run(USE, "-Werror", MMBAL_DISABLE_NATIVE="0")
    assert (result.returncode, result.stdout, result.stderr) == (0, "None\n", "")


def test_reference_runs_without_a_word_where_it_is_asked_for() -> None:
    result = run(USE, "-Werror", MMBAL_DISABLE_NATIVE="1")
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == ("MMBAL_DISABLE_NATIVE is set\n", "")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            "ModuleNotFoundError(name='mmbal_fast._C')",
            "the native module mmbal_fast._C was not built",
        ),
        (
            "ImportError('libgomp.so.1: cannot open shared object file')",
            "the native module could not be loaded (libgomp.so.1: cannot open shared object file)",
        ),
    ],
)
def test_one_warning_where_there_is_no_native_module(error: str, reason: str) -> None:
    result = run(HOOK.format(error=error) + USE, "-Walways::RuntimeWarning")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{reason}\n"
    assert result.stderr.count("Warning") == 1
    assert f"RuntimeWarning: mmbal_fast: {reason}; the slower reference" in result.stderr
    assert "To build it, install a C++17 compiler and run" in result.stderr


def test_unknown_instruction_set_names_those_that_are_known(cpu: Backend) -> None:
    assert cpu.native is not None
    result = run(USE, "-Walways::RuntimeWarning", MMBAL_CPU_ISA="sse9")
    known = ", ".join(cpu.native.cpu_isas())
    reason = f"MMBAL_CPU_ISA: must be one of {known} on this processor (got 'sse9')"
    assert result.stdout == f"the native module could not be loaded ({reason})\n"
    assert result.stderr.count("Warning") == 1


def test_devices(backend: Backend) -> None:
    assert _backend.runs(torch.device("cpu")) is backend.native
    assert _backend.runs(torch.device("meta")) is None
    on_cuda = _backend.runs(torch.device("cuda"))
    assert on_cuda is (backend.native if torch.cuda.is_available() else None)


def test_module_that_was_switched_comes_back() -> None:
    before = _backend.native
    other = cast(ModuleType, SimpleNamespace(build_info=lambda: {"emulated": False}))
    with _backend.using(other):
        assert _backend.native is other
    assert _backend.native is before
    with pytest.raises(StopIteration), _backend.using(other):
        next(iter(()))
    assert _backend.native is before


def test_workspace_is_kept_and_grows(native: Backend) -> None:
    if not native.cuda_kernels:
        pytest.skip("the CPU has its own scratch memory")
    first = _backend.workspace(100, 0, 0, False)
    assert first.numel() >= 100
    assert first.device.type == native.device.type
    assert not first.any()
    assert _backend.workspace(50, 0, 0, False) is first
    larger = _backend.workspace(200, 0, 0, False)
    assert larger.numel() >= 200
    assert _backend.workspace(200, 0, 0, False) is larger
    assert _backend.workspace(200, 0, 1, False) is not larger  # another stream


@pytest.mark.in_one_launch
def test_workspace_serves_operations_in_any_order(native: Backend) -> None:
    """Each leaves the counters in it as the next needs them, of whatever size that is."""
    if not native.cuda_kernels:
        pytest.skip("the CPU has its own scratch memory")
    torch.manual_seed(0)
    logits = [torch.randn(40, 3, device=native.device) for _ in range(3)]
    target = torch.randint(3, (40,), device=native.device)
    grads = [torch.randn(size, device=native.device) for size in (5, 9000, 4096, 1)]
    k = torch.tensor([0.5], device=native.device)
    scores = functional.contribution_scores(logits, target)
    moments = functional.gradient_moments(grads)
    for _ in range(3):
        assert torch.equal(functional.contribution_scores(logits, target), scores)
        functional.modulate_([grads[0].clone()], k, [0])
        assert torch.equal(functional.gradient_moments(grads), moments)
        functional.modulate_([grad.clone() for grad in grads], k, [0] * 4)
        some = [each[:7] for each in logits]
        functional.contribution_scores(some, target[:7])
        assert torch.equal(functional.gradient_moments(grads[1:2]), moments[1:2])
