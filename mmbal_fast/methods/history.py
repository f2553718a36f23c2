"""Scores, ratios and coefficients over a training, for loggers and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mmbal_fast.methods.ogm_ge import ModulationRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTITIES = ("score", "ratio", "coefficient")
"""What a record holds of each modality."""

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
"""Of Okabe and Ito's palette, which people who see few colours can tell apart."""

STYLES = ("solid", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
"""The modalities' lines differ in black and white too."""


class ScalarWriter(Protocol):
    """Such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Writes one number."""


class MappingLogger(Protocol):
    """Such as a run of Weights & Biases."""

    def log(self, values: dict[str, float], *, step: int) -> object:
        """Writes the numbers of one step."""


def tags(names: Sequence[str]) -> list[str]:
    """What loggers call the numbers of a record, in the order of its stacked tensors.

    Example:
        >>> from mmbal_fast.methods.history import tags
        >>> tags(["audio"])
        ['modulation/score/audio', 'modulation/ratio/audio', 'modulation/coefficient/audio']
    """
    return [f"modulation/{quantity}/{name}" for quantity in QUANTITIES for name in names]


class ModulationHistory:
    """Keeps what the steps of an `OGMGE` measured and applied, without ever waiting for the device.

    Records are collected in a buffer on the device. When it is full it is copied to the host, on
    CUDA into pinned memory and in the background; `record` then costs two small kernels and no
    synchronisation. What is read before the copy is there waits for it: `to_dict`, `plot`, `flush`.

    Steps with scores that are not finite, and steps that a `torch.amp.GradScaler` skips, are left
    out.

    Args:
        names: the modalities, `OGMGE.modality_names`.
        every: steps between two copies; default 100. The writer gets the numbers of a step, with
            its number, up to twice as many steps later.
        writer: where to write every step: an object with ``add_scalar(tag, value, step)``, such as
            TensorBoard's ``SummaryWriter``, or with ``log(values, step=step)``; default nowhere.
            The tags are ``modulation/score/<name>``, and so for ``ratio`` and ``coefficient``.

    Raises:
        ValueError: no names, or ``every`` below 1.
        TypeError: a writer that has neither method.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import mmbal_fast
        >>> encoders = nn.ModuleDict({"audio": nn.Linear(4, 3), "image": nn.Linear(4, 3)})
        >>> balancer = mmbal_fast.OGMGE(encoders, alpha=0.8)
        >>> history = mmbal_fast.ModulationHistory(balancer.modality_names)
        >>> confident, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.zeros(1, 3)
        >>> logits = {"audio": confident, "image": unsure}
        >>> for _ in range(3):
        ...     history.record(balancer.step(logits, torch.tensor([0])))
        >>> table = history.to_dict()
        >>> list(table)[:3]
        ['step', 'score/audio', 'score/image']
        >>> table["step"], [round(each, 2) for each in table["ratio/audio"]]
        ([0, 1, 2], [3.0, 3.0, 3.0])
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        every: int = 100,
        writer: ScalarWriter | MappingLogger | None = None,
    ) -> None:
        op = type(self).__name__
        self.names = tuple(names)
        """The modalities, in the order of the records' entries."""
        if not self.names:
            raise ValueError(f"{op}: names must hold a modality (got none)")
        if every < 1:
            raise ValueError(f"{op}: every must be at least 1 (got {every})")
        if not (writer is None or hasattr(writer, "add_scalar") or hasattr(writer, "log")):
            raise TypeError(
                f"{op}: writer must have add_scalar or log (got {type(writer).__name__})"
            )
        self._every = every
        self._writer: Any = writer
        self._buffer: Tensor | None = None  # [every, 3, M] on the records' device
        self._steps: list[int] = []  # of the rows in the buffer
        self._next = 0
        self._copies: list[_Copy] = []  # on their way to the host
        self._kept_steps: list[int] = []
        self._kept: list[Tensor] = []  # each [n, 3, M] on the host, without rows to leave out

    @torch.no_grad()
    def record(self, record: ModulationRecord, step: int | None = None) -> None:
        """Keeps a step. Call it after `OGMGE.step`, which returns the record.

        Args:
            record: each tensor ``[M]``; copied.
            step: its number on the plot's and the logger's axis; by default one more than that of
                the call before, from 0.

        Raises:
            ValueError: a record of another number of modalities.
        """
        if record.scores.shape != (len(self.names),):
            raise ValueError(
                f"ModulationHistory.record: record must have {len(self.names)} modalities "
                f"(got shape {list(record.scores.shape)})"
            )
        device = record.scores.device
        if self._buffer is None or self._buffer.device != device:
            self._send()
            self._buffer = torch.empty(self._every, 3, len(self.names), device=device)
        row = self._buffer[len(self._steps)]
        torch.stack((record.scores, record.ratios, record.coefficients), out=row)
        row[0].masked_fill_(record.skipped, torch.nan)
        self._steps.append(self._next if step is None else step)
        self._next = self._steps[-1] + 1
        if len(self._steps) == self._every:
            self._send()
            self._receive(wait=False)

    def flush(self) -> None:
        """Brings everything to the host and to the writer. Waits for the device."""
        self._send()
        self._receive(wait=True)

    def to_dict(self) -> dict[str, list[float]]:
        """Everything recorded, in columns: ``pandas.DataFrame(history.to_dict())``.

        Waits for the device.

        Returns:
            ``step``, and for each modality ``score/<name>``, ``ratio/<name>`` and
            ``coefficient/<name>``; as many numbers in each.
        """
        self.flush()
        columns = [f"{quantity}/{name}" for quantity in QUANTITIES for name in self.names]
        rows = self._rows().flatten(1)
        values = rows.t().tolist()
        return {"step": list(self._kept_steps), **dict(zip(columns, values, strict=True))}

    def plot(self, path: str | PathLike[str], *, window: int | None = None) -> None:
        """Draws scores, ratios and coefficients over the steps. Needs matplotlib.

        Waits for the device.

        Args:
            path: of the picture to write; the suffix decides the format.
            window: steps of the running mean that is drawn over the single steps; by default a
                fiftieth of the training.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: nothing was recorded, or ``window`` is below 1.
        """
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        self.flush()
        if not self._kept_steps:
            raise ValueError("ModulationHistory.plot: needs a recorded step (got none)")
        window = max(1, len(self._kept_steps) // 50) if window is None else window
        if window < 1:
            raise ValueError(f"ModulationHistory.plot: window must be at least 1 (got {window})")
        figure = Figure(figsize=(8, 7.5), dpi=150, layout="constrained")
        panels = figure.subplots(3, 1, sharex=True)
        for quantity, axes in enumerate(panels):
            self._draw(axes, self._rows()[:, quantity], window)
        scores, ratios, coefficients = panels
        scores.set(title="Contribution", ylabel="score of the batch")
        scores.set_ylim(bottom=0)
        ratios.set(title="Discrepancy: above 1 dominates", ylabel="ratio", yscale="log")
        ratios.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ratios.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ratios.yaxis.set_minor_formatter(NullFormatter())
        ratios.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
        coefficients.set(title="What gradients are scaled by", ylabel="coefficient", xlabel="step")
        coefficients.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
        coefficients.set_ylim(bottom=0)
        handles, labels = scores.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(self.names))
        figure.savefig(path)

    def __len__(self) -> int:
        """How many steps are kept. Waits for the device."""
        self.flush()
        return len(self._kept_steps)

    def _send(self) -> None:
        """Starts the copy of what the buffer holds."""
        if self._buffer is None or not self._steps:
            return
        self._copies.append(_Copy.of(self._buffer[: len(self._steps)], self._steps))
        self._steps = []

    def _receive(self, wait: bool) -> None:
        """Takes the copies that arrived, or all, in their order."""
        while self._copies and self._copies[0].arrived(wait):
            copy = self._copies.pop(0)
            kept = copy.rows[:, 0].isfinite().all(dim=1)
            steps = [step for step, keep in zip(copy.steps, kept.tolist(), strict=True) if keep]
            rows = copy.rows[kept]
            self._kept_steps += steps
            self._kept.append(rows)
            if self._writer is not None:
                for step, row in zip(steps, rows.flatten(1).tolist(), strict=True):
                    self._write(dict(zip(tags(self.names), row, strict=True)), step)

    def _write(self, values: Mapping[str, float], step: int) -> None:
        if hasattr(self._writer, "add_scalar"):
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
        else:
            self._writer.log(dict(values), step=step)

    def _rows(self) -> Tensor:
        """float32 ``[n, 3, M]``: all that is on the host."""
        self._kept = [torch.cat([torch.empty(0, 3, len(self.names)), *self._kept])]
        return self._kept[0]

    def _draw(self, axes: Axes, values: Tensor, window: int) -> None:
        """A line per modality: single steps faintly, their running mean boldly."""
        for index, name in enumerate(self.names):
            color, style = COLORS[index % len(COLORS)], STYLES[index % len(STYLES)]
            column = values[:, index]
            if window > 1:
                axes.plot(self._kept_steps, column.tolist(), color=color, alpha=0.25, lw=0.7)
            mean = running_mean(column, window).tolist()
            axes.plot(self._kept_steps, mean, color=color, linestyle=style, label=name)
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class _Copy:
    """Rows of the buffer, on their way to the host."""

    rows: Tensor
    steps: list[int]
    done: torch.cuda.Event | None
    """None where the rows are there."""

    @staticmethod
    def of(rows: Tensor, steps: list[int]) -> _Copy:
        """Starts the copy."""
        if rows.device.type != "cuda":
            return _Copy(rows.to("cpu", copy=True), steps, None)
        # The allocator keeps pinned memory for the next copy: no system call after the first two.
        pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        pinned.copy_(rows, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(rows.device))
        return _Copy(pinned, steps, done)

    def arrived(self, wait: bool) -> bool:
        """Whether the rows are there, after waiting for them if asked to."""
        if self.done is None:
            return True
        if wait:
            self.done.synchronize()
        return bool(self.done.query())  # type: ignore[no-untyped-call]


def running_mean(values: Tensor, window: int) -> Tensor:
    """Mean of the finite values among the last ``window``, NaN where there are none.

    Example:
        >>> import torch
        >>> from mmbal_fast.methods.history import running_mean
        >>> running_mean(torch.tensor([1.0, 3.0, float("inf"), 5.0]), window=2)
        tensor([1., 2., 3., 5.])
    """
    finite = values.isfinite()

    def total(terms: Tensor) -> Tensor:
        sums = terms.double().cumsum(0)
        return sums - torch.cat([sums.new_zeros(window), sums])[: len(sums)]

    return (total(torch.where(finite, values, 0.0)) / total(finite)).to(values.dtype)
