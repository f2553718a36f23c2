"""What makes the host wait for a device, counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = ["item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"]
METHODS += ["__array__", "__contains__", "nonzero"]

OPERATIONS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "unique"}
OPERATIONS |= {"masked_select", "_unique2", "bincount", "is_pinned", "_pin_memory"}


class _Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in OPERATIONS:
            self.found.append(name)
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and result.is_cpu and not args[name == "copy_"].is_cpu:
            self.found.append(f"{name} to cpu")
        return result


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """What the host reads: by operators, by methods (some dispatch nothing), by CUDA's own word."""
    mode = _Reads()
    with pytest.MonkeyPatch.context() as patch, mode:
        for name in METHODS:
            method = getattr(Tensor, name)

            def counted(self: Tensor, *args: Any, _name: str = name, _method: Any = method) -> Any:
                mode.found.append(f"Tensor.{_name}")
                return _method(self, *args)

            patch.setattr(Tensor, name, counted)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield mode.found
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
