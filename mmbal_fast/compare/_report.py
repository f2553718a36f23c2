"""What a comparison came to: lines for the CSV, tables, a plot."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from mmbal_fast.compare._corruptions import CORRUPTIONS
from mmbal_fast.compare._rows import ROWS, Row
from mmbal_fast.compare._runs import Results, best
from mmbal_fast.compare._trial import Run

COLORS = {"sgd": "#0072B2", "adamw": "#D55E00"}
"""Of Okabe and Ito's palette, which people who see few colours can tell apart."""

NAMES = {"sgd": "SGD", "adamw": "AdamW"}


@dataclass(frozen=True)
class Line:
    """A row with one seed, at the learning rate that the validation samples chose."""

    data: str
    optimizer: str
    row: str
    """A key of `ROWS`, or "alone:" and a modality."""
    seed: int
    rate: float
    validation: float
    accuracy: float
    """Of the test set, in per cent, like all that follow."""
    own: dict[str, float]
    """Of each modality's own classifier; empty where the row is one."""
    corrupted: dict[str, dict[str, float]]
    """By corruption and by the modality that is corrupted; empty where not measured."""
    told: dict[str, float]
    """By the modality that is left out by who knows which: the reference for `corrupted`."""
    step_ms: float
    """CPU time of the median training step."""

    @property
    def label(self) -> str:
        """For readers."""
        kind, _, modality = self.row.partition(":")
        return f"{modality} alone" if modality else ROWS[kind].label

    @property
    def uses(self) -> str:
        """What it needs beyond the training samples."""
        return ROWS[self.row.partition(":")[0]].uses

    @property
    def reference(self) -> float:
        """Of the test set, in per cent: `told`, the mean over which modality it is."""
        return mean(self.told.values())

    def with_corrupted(self, kind: str) -> float:
        """Of the test set, in per cent, the mean over which modality is corrupted."""
        return mean(self.corrupted[kind].values())


def lines(results: Results, rows: Iterable[Row]) -> list[Line]:
    """Chooses the learning rates, by the validation accuracy of each row and seed.

    The first of equally good ones counts.
    """
    out = []
    settings = dict.fromkeys((run.data, run.optimizer) for run in results)
    for data, optimizer in settings:
        here = {run: each for run, each in results.items() if run.data == data}
        here = {run: each for run, each in here.items() if run.optimizer == optimizer}
        for row in rows:
            seeds = sorted({run.seed for run in here if run.training == row.training})
            for seed in seeds:
                tried = {
                    run: result
                    for run, result in here.items()
                    if run.training == row.training and run.seed == seed
                }
                name = Path(data).stem
                out += _chosen(name, optimizer, row, seed, tried)
    order = {(line.data, line.optimizer, line.row): place for place, line in enumerate(out)}
    return sorted(out, key=lambda line: order[line.data, line.optimizer, line.row])


def _chosen(
    data: str, optimizer: str, row: Row, seed: int, tried: Mapping[Run, dict[str, Any]]
) -> list[Line]:
    if row.prediction == "alone":
        out = []
        for name in next(iter(tried.values()))["own"]:
            run, found = max(tried.items(), key=lambda each: each[1]["alone"][name])
            out.append(
                Line(
                    data,
                    optimizer,
                    f"{row.key}:{name}",
                    seed,
                    run.rate,
                    validation=found["alone"][name],
                    accuracy=found["own"][name],
                    own={},
                    corrupted={},
                    told={},
                    step_ms=found["step_ms"],
                )
            )
        return out
    run, found = best(tried.items(), row.prediction)
    way = found["ways"][row.prediction]
    corrupted = way.get("corrupted", {})
    return [
        Line(
            data,
            optimizer,
            row.key,
            seed,
            run.rate,
            validation=way["validation"],
            accuracy=way["test"],
            own=found["own"],
            corrupted=corrupted,
            told=found["told"] if corrupted else {},
            step_ms=found["step_ms"],
        )
    ]


def write_csv(lines: Sequence[Line], path: Path) -> None:
    """One line per row and seed."""
    columns = [each.name for each in fields(Line) if each.name != "corrupted"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *CORRUPTIONS], lineterminator="\n")
        writer.writeheader()
        for line in lines:
            values = asdict(line) | line.corrupted
            del values["corrupted"]
            for name, value in values.items():
                if isinstance(value, dict):  # by modality
                    values[name] = " ".join(f"{key}={each:.2f}" for key, each in value.items())
                elif isinstance(value, float) and name != "rate":
                    values[name] = f"{value:.2f}"
            writer.writerow(values)


# ---- Statistics ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """A row over its seeds."""

    lines: tuple[Line, ...]
    joint: tuple[Line, ...]
    """Of the same seeds."""

    @property
    def first(self) -> Line:
        """For what all seeds have in common."""
        return self.lines[0]

    @property
    def accuracy(self) -> str:
        """Mean and standard deviation."""
        return spread([line.accuracy for line in self.lines])

    @property
    def differences(self) -> list[float]:
        """To joint training with the same seed."""
        return [a.accuracy - b.accuracy for a, b in zip(self.lines, self.joint, strict=True)]

    @property
    def difference(self) -> str:
        """Mean and standard error; bold beyond two standard errors, for Markdown."""
        if not self.joint or self.first.row == "joint":
            return ""
        text = signed(self.differences)
        return f"**{text}**" if clear(self.differences) else text

    @property
    def corrupted(self) -> bool:
        """Whether all seeds have been tried with a modality corrupted."""
        return all(line.corrupted for line in self.lines)

    def against_told(self, kind: str) -> list[float]:
        """By how much a corruption leaves it below or above `Line.reference`, by seed."""
        return [line.with_corrupted(kind) - line.reference for line in self.lines]

    @property
    def own(self) -> str:
        """Mean of each modality's own accuracy."""
        names = self.first.own
        return " ".join(f"{mean(line.own[name] for line in self.lines):.0f}" for name in names)

    @property
    def cost(self) -> str:
        """Time of a step against joint training's."""
        if not self.joint or not self.first.own:
            return ""
        ratios = [a.step_ms / b.step_ms for a, b in zip(self.lines, self.joint, strict=True)]
        return f"{median(ratios):.2f}"


def standard_error(values: Sequence[float]) -> float:
    """Of the mean.

    Example:
        >>> standard_error([1.0, 2.0, 3.0, 4.0]).__round__(4)
        0.6455
    """
    return float(stdev(values) / len(values) ** 0.5)


def signed(values: Sequence[float]) -> str:
    """Mean with its sign and standard error, the latter from two values on.

    Example:
        >>> signed([1.0, 2.0, 3.0]), signed([-1.0])
        ('+2.0 ± 0.6', '-1.0')
    """
    error = f" ± {standard_error(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):+.1f}{error}"


def clear(values: Sequence[float]) -> bool:
    """Whether the mean is beyond two standard errors; of one value none is known.

    Example:
        >>> clear([1.0, 2.0, 3.0]), clear([-1.0, 2.0, 3.0]), clear([9.0])
        (True, False, False)
    """
    return len(values) > 1 and abs(mean(values)) > 2 * standard_error(values)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, the latter from two values on.

    Example:
        >>> spread([58.0, 60.0]), spread([58.0])
        ('59.0 ± 1.4', '58.0')
    """
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{deviation}"


def summaries(lines: Sequence[Line]) -> dict[tuple[str, str], list[Summary]]:
    """Rows by data set and optimizer."""
    out: dict[tuple[str, str], list[Summary]] = {}
    for key in dict.fromkeys((line.data, line.optimizer) for line in lines):
        here = [line for line in lines if (line.data, line.optimizer) == key]
        joint = {line.seed: line for line in here if line.row == "joint"}
        out[key] = []
        for row in dict.fromkeys(line.row for line in here):
            own = [line for line in here if line.row == row]
            paired = [joint[line.seed] for line in own if line.seed in joint]
            out[key].append(Summary(tuple(own), tuple(paired) if len(paired) == len(own) else ()))
    return out


# ---- Tables --------------------------------------------------------------------------------------


def markdown(lines: Sequence[Line]) -> str:
    """Two tables for each data set and optimizer: clean, and with one modality corrupted."""
    out = []
    for (data, optimizer), rows in summaries(lines).items():
        names = next((" ".join(each.first.own) for each in rows if each.first.own), "")
        out.append(f"## {data}, {NAMES.get(optimizer, optimizer)}\n")
        out.append(f"| row | uses | accuracy, % | against joint | own: {names} | step |")
        out.append("| --- | --- | --- | --- | --- | --- |")
        for each in rows:
            cells = [each.first.label, each.first.uses, each.accuracy, each.difference]
            out.append(f"| {' | '.join([*cells, each.own, each.cost])} |")
        corrupted = [each for each in rows if each.corrupted]
        if corrupted:
            out.append(f"\n| row | uses | clean | told | {' | '.join(CORRUPTIONS)} |")
            out.append("| --- " * (len(CORRUPTIONS) + 4) + "|")
        for each in corrupted:
            cells = [each.first.label, each.first.uses, f"{_mean(each, 'accuracy'):.1f}"]
            cells.append(f"{_mean(each, 'reference'):.1f}")
            cells += [
                f"{mean(line.with_corrupted(kind) for line in each.lines):.1f} "
                f"({signed(each.against_told(kind))})"
                for kind in CORRUPTIONS
            ]
            out.append(f"| {' | '.join(cells)} |")
        out.append("")
    return "\n".join(out)


def _mean(summary: Summary, name: str) -> float:
    values: list[float] = [getattr(line, name) for line in summary.lines]
    return mean(values)


def table(data: str, optimizer: str, rows: Sequence[Summary]) -> Table:
    """For the terminal, at most 80 columns."""
    out = Table(title=f"{data}, {NAMES.get(optimizer, optimizer)}", title_justify="left")
    out.add_column("row, and what it uses", max_width=36)
    for name in ("accuracy, %", "to joint", "step"):
        out.add_column(name, justify="right", no_wrap=True)
    for each in rows:
        out.add_row(_named(each.first), each.accuracy, each.difference.strip("*"), each.cost)
    return out


def _named(line: Line) -> str:
    return line.label + (f"\n  [dim]{line.uses}[/dim]" if line.uses else "")


def corrupted_table(data: str, optimizer: str, rows: Sequence[Summary]) -> Table | None:
    """Accuracy with one modality corrupted, at most 80 columns; None where it was not measured."""
    measured = [each for each in rows if each.corrupted]
    if not measured:
        return None
    title = f"{data}, {NAMES.get(optimizer, optimizer)}, one modality corrupted: accuracy, %"
    out = Table(title=title, title_justify="left")
    out.add_column("row, and what it uses", max_width=21)
    for name in ("clean", "told", *CORRUPTIONS):
        out.add_column(name, justify="right", no_wrap=True)
    for each in measured:
        values = [_mean(each, "accuracy"), _mean(each, "reference")]
        values += [mean(line.with_corrupted(kind) for line in each.lines) for kind in CORRUPTIONS]
        out.add_row(_named(each.first), *(f"{value:.1f}" for value in values))
    return out


# ---- Plot ----------------------------------------------------------------------------------------


def figure(lines: Sequence[Line]) -> Figure:
    """What the rows gain over joint training, and what is left of them with a modality corrupted.

    A column for each data set. Above, differences to joint training with two standard errors.
    Below, where it was measured, the accuracy with one modality corrupted minus `Line.reference`:
    S by SGD, A by AdamW.
    """
    found = summaries(lines)
    datasets = list(dict.fromkeys(data for data, _ in found))
    shown = [line for line in lines if not line.row.startswith("alone")]
    labels = [list(dict.fromkeys(line.label for line in shown if line.row != "joint"))]
    if any(line.corrupted for line in lines):
        labels.append(list(dict.fromkeys(line.label for line in shown)))
    height = 1.2 + 0.3 * len(labels[0])
    parts = len(labels)
    out = Figure(figsize=(3 + 2.6 * len(datasets), parts * height), dpi=150, layout="constrained")
    panels = out.subplots(parts, len(datasets), sharey="row", squeeze=False)
    for column, data in enumerate(datasets):
        here = {optimizer: found.get((data, optimizer), []) for optimizer in COLORS}
        panels[0, column].set_title(data, loc="left", fontsize=10, fontweight="bold")
        _plot_differences(panels[0, column], here, labels[0])
        if parts == 2:
            _plot_corrupted(panels[1, column], here, labels[1])
    for first, names in zip(panels[:, 0], labels, strict=True):
        first.set_yticks(range(len(names)), names, fontsize=8)
        first.set_ylim(len(names) - 0.5, -0.5)
    panels[0, 0].legend(fontsize=8)
    return out


def _plot_differences(
    axes: Axes, found: Mapping[str, Sequence[Summary]], labels: Sequence[str]
) -> None:
    axes.axvline(0.0, color="0.5", linewidth=0.8, zorder=0)
    for offset, (optimizer, color) in zip((-0.15, 0.15), COLORS.items(), strict=True):
        points = [
            (labels.index(each.first.label) + offset, each.differences)
            for each in found[optimizer]
            if each.first.label in labels and each.joint
        ]
        if points:
            places, values = zip(*points, strict=True)
            errors = [2 * standard_error(each) if len(each) > 1 else 0.0 for each in values]
            axes.errorbar(
                [mean(each) for each in values],
                places,
                xerr=errors,
                fmt="o" if optimizer == "sgd" else "s",
                markersize=4,
                color=color,
                label=NAMES[optimizer],
            )
    axes.set_xlabel("accuracy - joint")
    axes.grid(axis="x", color="0.92")


def _plot_corrupted(
    axes: Axes, found: Mapping[str, Sequence[Summary]], labels: Sequence[str]
) -> None:
    cells = [(kind, optimizer) for kind in CORRUPTIONS for optimizer in COLORS]
    values = np.full((len(labels), len(cells)), np.nan)
    for column, (kind, optimizer) in enumerate(cells):
        for each in found[optimizer]:
            if each.corrupted:
                values[labels.index(each.first.label), column] = mean(each.against_told(kind))
    axes.imshow(values, cmap="RdBu", vmin=-40, vmax=40, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "white" if abs(value) > 25 else "black"
            axes.text(
                column, row, f"{value:.0f}", fontsize=5, color=color, ha="center", va="center"
            )
    names = [f"{kind} {NAMES[optimizer][0]}" for kind, optimizer in cells]
    axes.set_xticks(range(len(cells)), names, fontsize=7, rotation=90)
    axes.set_xlabel("one modality corrupted, accuracy - told")


def save(lines: Sequence[Line], directory: Path) -> list[Path]:
    """Writes ``results.csv``, ``table.md`` and ``compare.png``; returns their paths."""
    paths = [directory / name for name in ("results.csv", "table.md", "compare.png")]
    write_csv(lines, paths[0])
    paths[1].write_text(markdown(lines))
    figure(lines).savefig(paths[2])
    return paths
