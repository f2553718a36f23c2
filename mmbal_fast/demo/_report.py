"""The table and the plot at the end of the demo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from rich.table import Table

from mmbal_fast.demo._rows import ROWS
from mmbal_fast.demo._training import Trial

Results = Mapping[str, Sequence[Trial]]
"""The trials of each row, one per seed."""

COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
"""Of Okabe and Ito's palette, which people who see few colours can tell apart."""

STYLES = ("solid", (0, (4, 1.5)))
"""Lines of every other row, so that one that covers another lets it be seen."""

Style = Mapping[str, Any]


def group(trials: Sequence[Trial]) -> Results:
    """Trials by row, in the order in which the rows came."""
    rows = dict.fromkeys(trial.row for trial in trials)
    return {row: [trial for trial in trials if trial.row == row] for row in rows}


# ---- Table ---------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation, the latter from two values on.

    Example:
        >>> spread([58.0, 60.0]), spread([58.0])
        ('59.0 ± 1.4', '58.0')
    """
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def added(trials: Sequence[Trial]) -> str:
    """Time that the method adds to a step, in ms and relative to the rest of the step."""
    extra = median(trial.added_seconds for trial in trials)
    step = median(trial.step_seconds for trial in trials)
    return f"{1e3 * extra:.2f} ms ({extra / (step - extra):.1%})" if extra else "-"


def table(results: Results) -> Table:
    """One line per row: accuracy, what rows measure besides, and time."""
    measures = dict.fromkeys(
        name for trials in results.values() for trial in trials for name in trial.measures
    )
    out = Table()
    out.add_column("training", no_wrap=True)
    for name in ("test accuracy, %", *measures, "added per step"):
        out.add_column(name, justify="right", no_wrap=True)
    for row, trials in results.items():
        cells = [spread([trial.accuracy for trial in trials])]
        for name in measures:
            values = [trial.measures[name] for trial in trials if name in trial.measures]
            cells.append(spread(values, digits=3) if values else "-")
        out.add_row(ROWS[row].label, *cells, added(trials))
    return out


# ---- Plot ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """A part of the plot: one curve, for every row that recorded it."""

    title: str
    curve: str
    """Its name in `Trial.curves`."""
    ylabel: str
    decorate: Callable[[Axes], object] = lambda axes: None
    """Limits, reference lines and the like."""


def _balance_at_1(axes: Axes) -> None:
    axes.axhline(1.0, color="0.5", linewidth=0.8, zorder=0)
    axes.annotate("balance", (0.99, 1.0), xycoords=("axes fraction", "data"), ha="right", va="top")


PANELS = (
    Panel("Whole model", "accuracy/model", "test accuracy, %"),
    Panel("What its gray part predicts alone", "accuracy/gray", "test accuracy, %"),
    Panel("How far colour dominates", "ratio/color", "discrepancy ratio", _balance_at_1),
    Panel(
        "What is left of the gradients of colour",
        "coefficient/color",
        "coefficient",
        lambda axes: axes.set_ylim(-0.03, 1.03),
    ),
)
"""What is drawn; those that no row recorded are left out."""


def styles(rows: Sequence[str]) -> dict[str, Style]:
    """How each row looks, the same in every panel."""
    return {
        row: {
            "color": COLORS[index % len(COLORS)],
            "linestyle": STYLES[index % len(STYLES)],
            "zorder": 2 + index % len(STYLES),  # the broken line above the solid one
        }
        for index, row in enumerate(rows)
    }


def figure(results: Results, epochs: int) -> Figure:
    """All panels: means over the seeds in bands of one standard deviation."""
    panels = [
        panel
        for panel in PANELS
        if any(panel.curve in trials[0].curves for trials in results.values())
    ]
    height = (len(panels) + 1) // 2
    out = Figure(figsize=(11, 1 + 3.4 * height), dpi=150, layout="constrained")
    grid = out.subplots(height, 2, squeeze=False).flat
    look = styles(list(results))
    for panel, axes in zip(panels, grid, strict=False):
        for row, trials in results.items():
            if panel.curve in trials[0].curves:
                _draw(axes, [trial.curves[panel.curve] for trial in trials], epochs, look[row])
        axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
        axes.set(xlabel="epoch", ylabel=panel.ylabel, xlim=(0, epochs))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        panel.decorate(axes)
    for axes in grid:  # the empty corner of an odd number of panels
        axes.set_visible(False)
    out.legend(
        handles=[Line2D([], [], label=ROWS[row].label, **look[row]) for row in results],
        loc="outside upper center",
        ncols=5 if len(results) <= 5 else 4,
        frameon=False,
    )
    seeds = len(next(iter(results.values())))
    out.supxlabel(
        f"mean of {seeds} runs and one standard deviation around it; "
        "ratio and coefficient averaged over an epoch"
        if seeds > 1
        else "one run; ratio and coefficient averaged over an epoch",
        fontsize=9,
        color="0.4",
    )
    return out


def _draw(axes: Axes, curves: Sequence[Sequence[float]], epochs: int, look: Style) -> None:
    smooth = np.array([smoothed(curve, round(len(curve) / epochs)) for curve in curves])
    points = smooth.shape[1]
    x = epochs * np.arange(1, points + 1) / points
    center, width = smooth.mean(axis=0), smooth.std(axis=0)
    axes.plot(x, center, marker="o" if points == 1 else None, **look)
    axes.fill_between(x, center - width, center + width, color=look["color"], alpha=0.15, lw=0)


def smoothed(curve: Sequence[float], window: int) -> NDArray[np.float64]:
    """A centred running mean, over fewer points at the ends.

    Example:
        >>> smoothed([0.0, 3.0, 6.0, 3.0], window=3).tolist()
        [1.5, 3.0, 4.0, 4.5]
    """
    ones = np.ones(window)
    counts = np.convolve(np.ones(len(curve)), ones, mode="same")
    return np.convolve(curve, ones, mode="same") / counts


def blending_figure(results: Results, epochs: int) -> Figure | None:
    """OGR and weight of each head over the super-epochs, of the first run with each variant."""
    rows = [row for row in results if "OGR/fused" in results[row][0].curves]
    if not rows:
        return None
    out = Figure(figsize=(11, 3.4 * len(rows)), dpi=150, layout="constrained")
    for pair, row in zip(out.subplots(len(rows), 2, squeeze=False), rows, strict=True):
        curves = results[row][0].curves
        for axes, curve, label in zip(
            pair, ("OGR", "weight"), ("OGR (log)", "weight"), strict=True
        ):
            for color, head in zip(COLORS, ("gray", "color", "fused"), strict=False):
                values = curves[f"{curve}/{head}"]
                # Online a measurement belongs to the end of its super-epoch; offline to the start.
                x = [epochs * (i + 2) / (len(values) + 1) for i in range(len(values))]
                if len(values) == 1:
                    x, values = [0, epochs], values * 2
                axes.plot(x, values, marker="o", color=color, label=head)
            axes.set_title(ROWS[row].label, loc="left", fontsize=11, fontweight="bold")
            axes.set(xlabel="epoch", ylabel=label, xlim=(0, epochs * 1.02))
            axes.grid(color="0.92")
        pair[0].set_yscale("log")
        pair[1].set_ylim(-0.03, 1.03)
        pair[0].legend(frameon=False)
    return out


def greedy_figure(results: Results, epochs: int) -> Figure | None:
    """Both learning speeds of the first balanced run, the rebalancing windows shaded."""
    rows = [row for row in results if "speed/gray" in results[row][0].curves]
    if not rows:
        return None
    out = Figure(figsize=(11, 3.4 * len(rows)), dpi=150, layout="constrained")
    for (axes,), row in zip(out.subplots(len(rows), 1, squeeze=False), rows, strict=True):
        curves = results[row][0].curves
        steps = len(curves["speed/gray"])
        x = epochs * np.arange(1, steps + 1) / steps
        for color, branch in zip(COLORS[1:], ("gray", "color"), strict=False):
            axes.plot(x, curves[f"speed/{branch}"], color=color, label=f"speed of {branch}")
        if "rebalancing/on" in curves:
            axes.fill_between(
                x,
                0,
                1,
                where=np.array(curves["rebalancing/on"]) > 0,
                transform=axes.get_xaxis_transform(),
                color="0.85",
                lw=0,
                label="rebalancing",
            )
        axes.set_title(ROWS[row].label, loc="left", fontsize=11, fontweight="bold")
        axes.set(xlabel="epoch", ylabel="conditional learning speed", xlim=(0, epochs))
        axes.legend(frameon=False, ncols=3)
    return out


def save(results: Results, epochs: int, directory: Path) -> list[Path]:
    """Writes the plots.

    Returns:
        Their paths, the one with all rows first.
    """
    directory.mkdir(parents=True, exist_ok=True)
    figures = {
        "demo.png": figure(results, epochs),
        "gradient-blending.png": blending_figure(results, epochs),
        "greedy.png": greedy_figure(results, epochs),
    }
    paths = []
    for name, each in figures.items():
        if each is not None:
            paths.append(directory / name)
            each.savefig(paths[-1])
    return paths
