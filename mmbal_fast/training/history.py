"""What the steps of a method measured and applied over a training, for loggers and plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mmbal_fast.training.method import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def tags(names: Sequence[str], quantities: Sequence[str]) -> list[str]:
    """What loggers call the numbers of a record, in the order of its stacked tensors.

    Example:
        >>> from mmbal_fast.training.history import tags
        >>> tags(["audio"], ["scores", "ratios"])
        ['balance/scores/audio', 'balance/ratios/audio']
    """
    return [f"balance/{quantity}/{name}" for quantity in quantities for name in names]


def values_of(record: Record, names: Sequence[str]) -> dict[str, float]:
    """A record's numbers by their tags; none if it was skipped or its first is not finite.

    Reads the host.
    """
    quantities = record.quantities(len(names))
    rows = torch.stack([each.to(torch.float64) for each in quantities.values()])
    if bool(getattr(record, "skipped", False)) or not bool(rows[0].isfinite().all()):
        return {}
    return dict(zip(tags(names, list(quantities)), rows.flatten().tolist(), strict=True))


class History:
    """Keeps what the steps of a `Method` measured and applied, without ever waiting for the device.

    Records are collected in a buffer on the device. When it is full it is copied to the host, on
    CUDA into pinned memory and in the background; `record` then costs a few small kernels and no
    synchronisation. What is read before the copy is there waits for it: `to_dict`, `plot`, `flush`.

    Every tensor ``[M]`` of the record is kept. Steps whose first tensor is not finite, and steps
    that a `torch.amp.GradScaler` skips, are left out.

    Args:
        names: of the modalities, heads or branches: `Method.names`.
        every: steps between two copies; default 100. The writer gets the numbers of a step, with
            its number, up to twice as many steps later.
        writer: where to write every step: an object with ``add_scalar(tag, value, step)``, such as
            TensorBoard's ``SummaryWriter``, or with ``log(values, step=step)``; default nowhere.
            The tags are ``balance/scores/<name>``, and so for every field of the record.

    Raises:
        ValueError: no names, or ``every`` below 1.
        TypeError: a writer that has neither method.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import mmbal_fast
        >>> encoders = nn.ModuleDict({"audio": nn.Linear(4, 3), "image": nn.Linear(4, 3)})
        >>> for parameter in encoders.parameters():
        ...     parameter.grad = torch.ones_like(parameter)
        >>> balancer = mmbal_fast.OGMGE(encoders, alpha=0.8)
        >>> history = mmbal_fast.History(balancer.names)
        >>> confident, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.zeros(1, 3)
        >>> logits = {"audio": confident, "image": unsure}
        >>> for _ in range(3):
        ...     history.record(balancer.step(logits, torch.tensor([0])))
        >>> table = history.to_dict()
        >>> list(table)[:3]
        ['step', 'scores/audio', 'scores/image']
        >>> table["step"], [round(each, 2) for each in table["ratios/audio"]]
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
        """Of the modalities, heads or branches, in the order of the records' entries."""
        if not self.names:
            raise ValueError(f"{op}: names must hold at least one (got none)")
        if every < 1:
            raise ValueError(f"{op}: every must be at least 1 (got {every})")
        if not (writer is None or hasattr(writer, "add_scalar") or hasattr(writer, "log")):
            raise TypeError(
                f"{op}: writer must have add_scalar or log (got {type(writer).__name__})"
            )
        self._every = every
        self._writer: Any = writer
        self._kind: type[Record] | None = None
        self._quantities: tuple[str, ...] = ()  # Q of them
        self._buffer: Tensor | None = None  # [every, Q, M] on the records' device
        self._steps: list[int] = []  # of the rows in the buffer
        self._next = 0
        self._copies: list[_Copy] = []  # on their way to the host
        self._kept_steps: list[int] = []
        self._kept: list[Tensor] = []  # each [n, Q, M] on the host, without rows to leave out

    @torch.no_grad()
    def record(self, record: Record, step: int | None = None) -> None:
        """Keeps a step. Call it with what the method's step returned, or with its `last`.

        Args:
            record: its tensors ``[M]`` are copied.
            step: its number on the plot's and the logger's axis; by default one more than that of
                the call before, from 0.

        Raises:
            ValueError: a record of another number of modalities, or of another kind than before.
        """
        quantities = record.quantities(len(self.names))
        if not quantities:
            raise ValueError(
                f"History.record: record must have tensors of {len(self.names)} entries, one for "
                f"each of {list(self.names)} (got {type(record).__name__} with none)"
            )
        if self._kind is None:
            self._kind, self._quantities = type(record), tuple(quantities)
        if (type(record), tuple(quantities)) != (self._kind, self._quantities):
            raise ValueError(
                f"History.record: records must be of one kind, {self._kind.__name__} with "
                f"{', '.join(self._quantities)} (got {type(record).__name__} with "
                f"{', '.join(quantities)})"
            )
        tensors = [*quantities.values()]
        device = tensors[0].device
        if self._buffer is None or self._buffer.device != device:
            self._send()
            dtype = max((each.dtype for each in tensors), key=lambda dtype: dtype.itemsize)
            shape = self._every, len(tensors), len(self.names)
            self._buffer = torch.empty(shape, dtype=dtype, device=device)
        row = self._buffer[len(self._steps)]
        torch.stack([each.to(row.dtype) for each in tensors], out=row)
        if (skipped := getattr(record, "skipped", None)) is not None:
            row[0].masked_fill_(skipped, torch.nan)
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
            ``step``, and for each quantity of the record and each name ``<quantity>/<name>``, such
            as ``ratios/audio``; as many numbers in each.
        """
        self.flush()
        columns = [f"{quantity}/{name}" for quantity in self._quantities for name in self.names]
        rows = self._rows().flatten(1)
        values = rows.t().tolist()
        return {"step": list(self._kept_steps), **dict(zip(columns, values, strict=True))}

    def plot(self, path: str | PathLike[str], *, window: int | None = None) -> None:
        """Draws a panel for each quantity over the steps. Needs matplotlib.

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
            raise ValueError("History.plot: needs a recorded step (got none)")
        window = max(1, len(self._kept_steps) // 50) if window is None else window
        if window < 1:
            raise ValueError(f"History.plot: window must be at least 1 (got {window})")
        assert self._kind is not None
        metadata = {each.name: each.metadata for each in dataclasses.fields(self._kind)}
        count = len(self._quantities)
        figure = Figure(figsize=(8, 2.5 * count), dpi=150, layout="constrained")
        panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
        for index, (axes, quantity) in enumerate(zip(panels, self._quantities, strict=True)):
            self._draw(axes, self._rows()[:, index], window)
            look = metadata[quantity]
            axes.set(title=look.get("title", quantity), ylabel=look.get("label", quantity))
            if look.get("log"):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
            if "line" in look:
                axes.axhline(look["line"], color="0.6", linewidth=0.8, zorder=0)
            if "from" in look:
                axes.set_ylim(bottom=look["from"])
        panels[-1].set_xlabel("step")
        handles, labels = panels[0].get_legend_handles_labels()
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
                    self._write(
                        dict(zip(tags(self.names, self._quantities), row, strict=True)), step
                    )

    def _write(self, values: Mapping[str, float], step: int) -> None:
        if hasattr(self._writer, "add_scalar"):
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
        else:
            self._writer.log(dict(values), step=step)

    def _rows(self) -> Tensor:
        """``[n, Q, M]``: all that is on the host."""
        if not self._kept:
            return torch.empty(0, len(self._quantities), len(self.names), device="cpu")
        self._kept = [torch.cat(self._kept)]
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
        pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True, device="cpu")
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
        >>> from mmbal_fast.training.history import running_mean
        >>> running_mean(torch.tensor([1.0, 3.0, float("inf"), 5.0]), window=2)
        tensor([1., 2., 3., 5.])
    """
    finite = values.isfinite()

    def total(terms: Tensor) -> Tensor:
        sums = terms.double().cumsum(0)
        return sums - torch.cat([sums.new_zeros(window), sums])[: len(sums)]

    return (total(torch.where(finite, values, 0.0)) / total(finite)).to(values.dtype)
