"""What code of others may have set before ours runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def default(what: torch.dtype | str) -> Iterator[None]:
    """Makes a dtype, or the device of a name, torch's default."""
    if isinstance(what, str):
        with torch.device(what):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(what)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
