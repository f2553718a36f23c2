from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch

from mmbal_fast.demo import _digits, _greedy, _report
from mmbal_fast.demo._learner import Settings
from mmbal_fast.demo._models import images
from mmbal_fast.demo._training import Trial, run

EPOCHS = 2
PER_EPOCH = 16  # batches of 64 in the 1000 samples that are not held out


@cache
def train(row: str) -> Trial:
    return run(row, 0, Settings(epochs=EPOCHS), lambda: None)


@pytest.mark.parametrize("row", ["mmtm", "mmtm-balanced"])
def test_rows_record_speeds_and_d_util(row: str) -> None:
    trial = train(row)
    assert trial.accuracy > 20
    for branch in ("gray", "color"):
        assert len(trial.curves[f"accuracy/{branch}"]) == EPOCHS
        assert len(trial.curves[f"speed/{branch}"]) == EPOCHS * PER_EPOCH
        assert all(map(math.isfinite, trial.curves[f"speed/{branch}"]))
    assert math.isfinite(trial.measures["d_util"])
    assert (trial.added_seconds > 0) == (row == "mmtm-balanced")


def test_balancing_begins_after_an_epoch_and_changes_the_training() -> None:
    plain, balanced = train("mmtm"), train("mmtm-balanced")
    on = balanced.curves["rebalancing/on"]
    assert "rebalancing/on" not in plain.curves
    assert len(on) == EPOCHS * PER_EPOCH
    assert not any(on[:PER_EPOCH])
    windows = "".join(str(int(each)) for each in on).strip("0").split("0")
    assert windows
    assert {len(each) for each in windows[:-1]} <= {5}
    for branch in ("gray", "color"):
        one, other = plain.curves[f"speed/{branch}"], balanced.curves[f"speed/{branch}"]
        assert one[:PER_EPOCH] == other[:PER_EPOCH]
        assert one != other
    during = [a == b for a, b, c in zip(other, other[1:], on, strict=False) if c]
    assert during
    assert all(during)  # accumulation pauses


def test_plot_shows_both_speeds_and_shades_the_windows() -> None:
    trials = [train("mmtm"), train("mmtm-balanced")]
    figure = _report.greedy_figure(_report.group(trials), EPOCHS)
    assert figure is not None
    plain, balanced = figure.axes
    assert [line.get_label() for line in plain.lines] == ["speed of gray", "speed of color"]
    assert not plain.collections
    for line, branch in zip(balanced.lines, ("gray", "color"), strict=True):
        drawn = np.asarray(line.get_ydata()).tolist()
        assert drawn == trials[1].curves[f"speed/{branch}"]
    (shade,) = balanced.collections
    on = np.array(trials[1].curves["rebalancing/on"]) > 0
    assert len(shade.get_paths()) == np.sum(np.diff(on.astype(int)) == 1)


def test_prediction_is_the_mean_of_the_branches() -> None:
    model = _greedy.Joined().eval()
    batch = _digits.load(0)[0][:5]
    logits = model(*images(batch).values())
    assert all(each.shape == (5, 10) for each in logits.values())
    learner = _greedy.Greedy.__new__(_greedy.Greedy)
    learner.model = model
    expected = (logits["gray"] + logits["color"]) / 2
    torch.testing.assert_close(learner.predict(batch)["model"], expected)
