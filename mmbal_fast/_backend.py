"""Which code runs an operation: the native module where it is built, else the reference."""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

# The process must hold torch's OpenMP runtime before the native module asks for one, so that both
# share a thread pool: torch is imported above, and linters are not to move it.

_HOW_TO_BUILD = (
    "install a C++17 compiler and run `pip install --force-reinstall --no-deps .` in a clone of "
    "the repository; `mmbal-fast info` says more"
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
_CPU = torch.device("cpu")
_emulated = False  # the CUDA kernels run on host memory
single_launch = False
"""Whether CUDA kernels measure and update in one launch: `benchmarks/gpu_check.py` times both."""
_captured: list[Tensor] = []  # what belongs to graphs under emulation


class _Kept(threading.local):
    """Workspaces of a thread by device and stream."""

    def __init__(self) -> None:
        self.workspaces: dict[tuple[int, int], Tensor] = {}


_kept = _Kept()

if native is None and why_not != "MMBAL_DISABLE_NATIVE is set":
    warnings.warn(
        f"mmbal_fast: {why_not}; the slower reference in plain PyTorch runs instead. "
        f"To build it, {_HOW_TO_BUILD}.",
        RuntimeWarning,
        stacklevel=2,
    )


def runs(device: torch.device) -> ModuleType | None:
    """The native module if it has kernels for ``device``, else None."""
    # The name of a device's type takes 23 us in a cold cache.
    if device == _CPU or device.type == "cpu" or (device.type == "cuda" and _cuda_devices):
        return native
    return None


@contextmanager
def using(module: ModuleType | None, *, in_one_launch: bool = False) -> Iterator[None]:
    """Runs another build of the native module, or with None the reference. For tests."""
    global native, _emulated, single_launch, _kept
    before = native, _emulated, single_launch
    native, single_launch = module, in_one_launch
    _emulated = module is not None and module.build_info()["emulated"]
    _kept = _Kept()
    try:
        yield
    finally:
        native, _emulated, single_launch = before
        _kept = _Kept()
        _captured.clear()


def workspace(nbytes: int, device_index: int, stream: int, captured: bool) -> Tensor:
    """Memory for the CUDA kernels that a call queues on a stream.

    Zero when it is made, left by every kernel as the next one needs it, and kept between the calls
    of a thread: another thread's kernels may come between those of one call. A call that is
    captured gets memory of its own, which its graph sets to zero at every replay.
    """
    if captured and _emulated:
        # As cudaMalloc of the emulation; on CUDA torch keeps it for the graph.
        _captured.append(torch.frombuffer(bytearray(b"\xff" * nbytes), dtype=torch.uint8))
        return _captured[-1]
    device = torch.device("cpu") if _emulated else torch.device("cuda", device_index)
    if captured:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    key = device_index, stream
    held = _kept.workspaces.get(key)
    if held is None or held.numel() < nbytes:
        held = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        _kept.workspaces[key] = held
    return held
