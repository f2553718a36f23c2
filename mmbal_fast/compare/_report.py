"""What a comparison came to: lines for the CSV, tables, a plot."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from mmbal_fast.compare._corruptions import CORRUPTIONS
from mmbal_fast.compare._rows import ROWS, Row
from mmbal_fast.compare._runs import Results

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
    corrupted: dict[str, float]
    """Mean over the modalities, one of them corrupted, by corruption; empty where not measured."""
    told: float | None
    """The same where one is left out by who knows which: the reference for `corrupted`."""
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


def lines(results: Results, rows: Iterable[Row]) -> list[Line]:
    """Chooses the learning rates, by the validation accuracy of each row and seed.

    The first of equally good ones counts.
    """
    out = []
    settings = dict.fromkeys((run.data, run.optimizer) for run in results)
    for data, optimizer in settings:
        here = [each for each in results.items() if each[0].data == data]
        here = [each for each in here if each[0].optimizer == optimizer]
        for row in rows:
            seeds = sorted({run.seed for run, _ in here if run.training == row.training})
            for seed in seeds:
                tried = [
                    (run.rate, result)
                    for run, result in here
                    if run.training == row.training and run.seed == seed
                ]
                name = Path(data).stem
                out += _chosen(name, optimizer, row, seed, tried)
    order = {(line.data, line.optimizer, line.row): place for place, line in enumerate(out)}
    return sorted(out, key=lambda line: order[line.data, line.optimizer, line.row])


def _chosen(
    data: str, optimizer: str, row: Row, seed: int, tried: Sequence[tuple[float, dict[str, Any]]]
) -> list[Line]:
    if row.prediction == "alone":
        out = []
        for name in tried[0][1]["own"]:
            rate, best = max(tried, key=lambda each: each[1]["alone"][name])
            found = best["alone"][name], best["own"][name], {}, {}, None, best["step_ms"]  # type: ignore[var-annotated]
            out.append(Line(data, optimizer, f"{row.key}:{name}", seed, rate, *found))
        return out
    rate, best = max(tried, key=lambda each: each[1]["ways"][row.prediction]["validation"])
    way = best["ways"][row.prediction]
    corrupted = {kind: mean(each.values()) for kind, each in way.get("corrupted", {}).items()}
    told = mean(best["told"].values()) if corrupted else None
    found = way["validation"], way["test"], best["own"], corrupted, told, best["step_ms"]
    return [Line(data, optimizer, row.key, seed, rate, *found)]


def write_csv(lines: Sequence[Line], path: Path) -> None:
    """One line per row and seed."""
    columns = [each.name for each in fields(Line) if each.name != "corrupted"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *CORRUPTIONS], lineterminator="\n")
        writer.writeheader()
        for line in lines:
            values = asdict(line) | line.corrupted
            del values["corrupted"]
            values["own"] = " ".join(f"{name}={each:.2f}" for name, each in line.own.items())
            for name, value in values.items():
                if isinstance(value, float) and name != "rate":
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
        values = self.differences
        text = f"{mean(values):+.1f}"
        if len(values) > 1:
            error = standard_error(values)
            text += f" ± {error:.1f}"
            if abs(mean(values)) > 2 * error:
                text = f"**{text}**"
        return text

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
        corrupted = [each for each in rows if all(line.corrupted for line in each.lines)]
        if corrupted:
            out.append(f"\n| row | uses | clean | {' | '.join(CORRUPTIONS)} | told |")
            out.append("| --- " * (len(CORRUPTIONS) + 4) + "|")
        for each in corrupted:
            cells = [each.first.label, each.first.uses, f"{_mean(each, 'accuracy'):.1f}"]
            cells += [
                f"{mean(line.corrupted[kind] for line in each.lines):.1f}" for kind in CORRUPTIONS
            ]
            cells.append(f"{_mean(each, 'told'):.1f}")
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
        label = each.first.label + (f"\n  [dim]{each.first.uses}[/dim]" if each.first.uses else "")
        out.add_row(label, each.accuracy, each.difference.strip("*"), each.cost)
    return out


# ---- Plot ----------------------------------------------------------------------------------------


def figure(lines: Sequence[Line]) -> Figure:
    """Differences to joint training with two standard errors, a panel for each data set."""
    found = summaries(lines)
    datasets = list(dict.fromkeys(data for data, _ in found))
    labels = list(dict.fromkeys(line.label for line in lines if line.row != "joint"))
    labels = [each for each in labels if not each.endswith(" alone")]
    out = Figure(
        figsize=(3 + 2.6 * len(datasets), 1.2 + 0.3 * len(labels)), dpi=150, layout="constrained"
    )
    panels = out.subplots(1, len(datasets), sharey=True, squeeze=False)[0]
    for axes, data in zip(panels, datasets, strict=True):
        axes.axvline(0.0, color="0.5", linewidth=0.8, zorder=0)
        for offset, (optimizer, color) in zip((-0.15, 0.15), COLORS.items(), strict=True):
            points = [
                (labels.index(each.first.label) + offset, each.differences)
                for each in found.get((data, optimizer), [])
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
        axes.set_title(data, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("accuracy - joint")
        axes.grid(axis="x", color="0.92")
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=8)
    return out


def save(lines: Sequence[Line], directory: Path) -> list[Path]:
    """Writes ``results.csv``, ``table.md`` and ``compare.png``; returns their paths."""
    paths = [directory / name for name in ("results.csv", "table.md", "compare.png")]
    write_csv(lines, paths[0])
    paths[1].write_text(markdown(lines))
    figure(lines).savefig(paths[2])
    return paths
