from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.lines import Line2D
from rich.console import Console

from mmbal_fast.demo import _report
from mmbal_fast.demo._rows import ROWS
from mmbal_fast.demo._training import Trial


def trial(row: str, seed: int, accuracy: float, added: float = 0.0, **curves: list[float]) -> Trial:
    named = {name.replace("_", "/"): curve for name, curve in curves.items()}
    named["accuracy/model"] = [10.0, accuracy]
    return Trial(row, seed, accuracy, 0.010, added, named, {})


TRIALS = [
    trial("gray", 0, 98.0),
    trial("gray", 1, 99.0),
    trial("ogm", 0, 60.0, added=0.0004, ratio_color=[1.0, 2.0, 3.0, 2.0]),
    trial("ogm", 1, 62.0, added=0.0006, ratio_color=[1.0, 1.0, 1.0, 1.0]),
]


def rendered(trials: list[Trial]) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as capture:
        console.print(_report.table(_report.group(trials)))
    lines = [line.replace("┃", "│") for line in capture.get().splitlines()]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]


def points(line: Line2D) -> list[list[float]]:
    return np.column_stack([line.get_xdata(), line.get_ydata()]).tolist()


def test_table_has_means_deviations_and_added_time():
    assert rendered(TRIALS) == [
        ["training", "test accuracy, %", "added per step"],
        ["gray alone", "98.5 ± 0.7", "-"],
        ["joint + OGM", "61.0 ± 1.4", "0.50 ms (5.3%)"],  # of the 9.5 ms without it
    ]


def test_table_of_one_seed_has_no_deviation():
    assert rendered(TRIALS[:1])[1] == ["gray alone", "98.0", "-"]


def test_table_has_a_column_for_what_some_rows_measure():
    measured = [replace(each, measures={"d_util": 0.25 + each.seed / 2}) for each in TRIALS[2:]]
    assert rendered(TRIALS[:2] + measured) == [
        ["training", "test accuracy, %", "d_util", "added per step"],
        ["gray alone", "98.5 ± 0.7", "-", "-"],
        ["joint + OGM", "61.0 ± 1.4", "0.500 ± 0.354", "0.50 ms (5.3%)"],
    ]


def test_figure_draws_the_panels_that_have_curves():
    figure = _report.figure(_report.group(TRIALS), epochs=2)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == [
        panel.title for panel in _report.PANELS if panel.curve in ("accuracy/model", "ratio/color")
    ]
    assert all(axes.get_xlabel() == "epoch" and axes.get_ylabel() for axes in shown)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["gray alone", "joint + OGM"]


def test_figure_draws_means_over_the_epochs():
    figure = _report.figure(_report.group(TRIALS), epochs=2)
    accuracy, ratio = figure.axes[:2]
    gray, ogm = accuracy.lines
    assert points(gray) == [[1, 10], [2, 98.5]]
    assert points(ogm) == [[1, 10], [2, 61]]
    # Each point is averaged with the one before it: two points are an epoch.
    expected = [[0.5, 1], [1, 1.25], [1.5, 1.75], [2, 1.75]]
    assert expected in [points(line) for line in ratio.lines]


def test_figure_hides_an_empty_corner():
    figure = _report.figure(_report.group(TRIALS[:2]), epochs=2)
    assert [axes.get_visible() for axes in figure.axes] == [True, False]


def test_a_single_point_is_visible():
    single = replace(TRIALS[0], curves={"accuracy/model": [50.0]})
    figure = _report.figure(_report.group([single]), epochs=1)
    assert figure.axes[0].lines[0].get_marker() == "o"


def test_no_two_rows_look_alike():
    rows = [str(index) for index in range(14)]
    looks = _report.styles(rows).values()
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 14


def test_smoothing_keeps_a_constant_and_the_length():
    assert _report.smoothed([2.0] * 7, window=4).tolist() == pytest.approx([2.0] * 7)
    assert _report.smoothed([1.0, 5.0], window=1).tolist() == [1.0, 5.0]


def test_save_makes_the_directory(tmp_path):
    (path,) = _report.save(_report.group(TRIALS), 2, tmp_path / "new" / "folder")
    assert path.parent == tmp_path / "new" / "folder"
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_rows_with_curves_of_their_own_get_plots_of_their_own(tmp_path):
    heads = {
        f"{curve}/{head}": [0.1, 0.4]
        for curve in ("OGR", "weight")
        for head in ("gray", "color", "fused")
    }
    speeds = {"speed/gray": [1.0] * 4, "speed/color": [0.5] * 4, "rebalancing/on": [0.0, 1.0] * 2}
    trials = [
        Trial("blend-online", 0, 50.0, 0.01, 0.0, {"accuracy/model": [1.0, 2.0], **heads}, {}),
        Trial("mmtm-balanced", 0, 50.0, 0.01, 0.0, {"accuracy/model": [1.0, 2.0], **speeds}, {}),
    ]
    paths = _report.save(_report.group(trials), 2, tmp_path)
    assert [path.name for path in paths] == ["demo.png", "gradient-blending.png", "greedy.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


def test_every_panel_belongs_to_a_curve_of_some_row():
    assert {"accuracy/model", "ratio/color", "coefficient/color"} <= {
        panel.curve for panel in _report.PANELS
    }
    assert set(_report.group(TRIALS)) <= set(ROWS)
