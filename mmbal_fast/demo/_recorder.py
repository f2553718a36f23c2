"""What a training run writes down while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from time import thread_time

import torch
from torch import Tensor


class Recorder:
    """Curves and times of one run.

    Times are of this thread, which does all the work of a run, and not of the clock on the wall:
    they hold while other processes compete for the cores.

    Example:
        >>> import torch
        >>> from mmbal_fast.demo._recorder import Recorder
        >>> recorder = Recorder()
        >>> recorder.log("ratio", torch.tensor([2.0, 0.5]), ["gray", "color"])
        >>> recorder.curves()
        {'ratio/gray': [2.0], 'ratio/color': [0.5]}
    """

    def __init__(self) -> None:
        """Starts empty."""
        self.measures: dict[str, float] = {}
        """Further columns of the table, in the row's own words, such as ``d_util``."""
        self._names: dict[str, tuple[str, ...]] = {}
        self._values: dict[str, list[Tensor]] = {}
        self._steps: list[float] = []
        self._added: list[float] = []
        self._in_step = 0.0

    def log(self, curve: str, values: Tensor, names: Sequence[str]) -> None:
        """Adds a point to the curves ``curve/name``.

        A curve's points are spread evenly over the run, however many there are.

        Args:
            curve: what is measured; see `_report.PANELS`.
            values: ``[K]``, copied.
            names: K names, the same in each call.
        """
        self._names[curve] = tuple(names)
        self._values.setdefault(curve, []).append(values.detach().clone())

    def curves(self) -> dict[str, list[float]]:
        """Each curve by its name, as plain numbers."""
        return {
            f"{curve}/{name}": column.tolist()
            for curve, values in self._values.items()
            for name, column in zip(self._names[curve], torch.stack(values).unbind(1), strict=True)
        }

    @contextmanager
    def added(self) -> Iterator[None]:
        """Times what a method adds to a step; several times in a step add up."""
        start = thread_time()
        yield
        self._in_step += thread_time() - start

    @contextmanager
    def step(self) -> Iterator[None]:
        """Times a whole training step."""
        self._in_step = 0.0
        start = thread_time()
        yield
        self._steps.append(thread_time() - start)
        self._added.append(self._in_step)

    def step_seconds(self) -> float:
        """Median time of a step."""
        return median(self._steps)

    def added_seconds(self) -> float:
        """Median time that the method added to a step."""
        return median(self._added)
