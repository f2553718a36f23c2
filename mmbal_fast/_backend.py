"""Which code runs an operation: the native module where it is built, else the reference."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

# The process must hold torch's OpenMP runtime before the native module asks for one, so that both
# share a thread pool: torch is imported above, and linters are not to move it.

_HOW_TO_BUILD = (
    "reinstall with a C++17 compiler present (pip install --no-binary mmbal-fast mmbal-fast); "
    "`mmbal-fast info` says more"
)


def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("MMBAL_DISABLE_NATIVE", "") not in ("", "0"):
        return None, "MMBAL_DISABLE_NATIVE is set"
    try:
        return importlib.import_module("mmbal_fast._C"), None
    except ModuleNotFoundError:
        return None, "the native module mmbal_fast._C was not built"
    except ImportError as error:
        return None, f"the native module could not be loaded ({error})"


native, why_not = _load()
"""The native module, or None and the reason."""

_cuda_devices = native.cuda_device_count() if native is not None else 0
_emulated = False  # the CUDA kernels run on host memory
single_launch = False
"""Whether CUDA kernels measure and update in one launch: `benchmarks/gpu_check.py` times both."""
_workspaces: dict[tuple[int, int, bool], Tensor] = {}

if native is None and why_not != "MMBAL_DISABLE_NATIVE is set":
    warnings.warn(
        f"mmbal_fast: {why_not}; the slower reference in plain PyTorch runs instead. "
        f"To build it, {_HOW_TO_BUILD}.",
        RuntimeWarning,
        stacklevel=2,
    )


def runs(device: torch.device) -> ModuleType | None:
    """The native module if it has kernels for ``device``, else None."""
    if device.type == "cpu" or (device.type == "cuda" and _cuda_devices):
        return native
    return None


@contextmanager
def using(module: ModuleType | None, *, in_one_launch: bool = False) -> Iterator[None]:
    """Runs another build of the native module, or with None the reference. For tests."""
    global native, _emulated, single_launch
    before = native, _emulated, single_launch
    native, single_launch = module, in_one_launch
    _emulated = module is not None and module.build_info()["emulated"]
    _workspaces.clear()
    try:
        yield
    finally:
        native, _emulated, single_launch = before
        _workspaces.clear()


def workspace(nbytes: int, device_index: int) -> Tensor:
    """Memory for the CUDA kernels of the current stream, kept between calls.

    Zero when it is made, and left by every kernel as the next one needs it. A graph under capture
    gets its own, because its zeroing runs only when the graph is replayed.
    """
    if _emulated:
        device, key = torch.device("cpu"), (device_index, 0, False)
    else:
        device = torch.device("cuda", device_index)
        stream = torch.cuda.current_stream(device)
        key = (device_index, stream.cuda_stream, torch.cuda.is_current_stream_capturing())
    held = _workspaces.get(key)
    if held is None or held.numel() < nbytes:
        held = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        _workspaces[key] = held
    return held
