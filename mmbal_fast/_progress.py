"""Progress bars on standard error."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sized
from typing import TypeVar

T = TypeVar("T")


def shown(batches: Iterable[T], title: str, progress: bool | None) -> Iterable[T]:
    """The batches, with a progress bar while they are taken.

    Args:
        batches: of known or unknown number.
        title: what is done with them.
        progress: None shows the bar if ``rich`` is installed and standard error is a terminal.

    Raises:
        ModuleNotFoundError: ``progress`` is True and ``rich`` is not installed.
    """
    if progress is None:
        progress = importlib.util.find_spec("rich") is not None and sys.stderr.isatty()
    if not progress:
        return batches
    from rich.console import Console
    from rich.progress import track

    length = len(batches) if isinstance(batches, Sized) else None
    return track(batches, title, total=length, console=Console(stderr=True))
