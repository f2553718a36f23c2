from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mmbal_fast.compare import _report
from mmbal_fast.compare._corruptions import CORRUPTIONS
from mmbal_fast.compare._predictions import PREDICTIONS
from mmbal_fast.compare._report import Line, lines, summaries
from mmbal_fast.compare._rows import ROWS
from mmbal_fast.compare._trainings import TRAININGS
from mmbal_fast.compare._trial import Run


def result(validation: float, test: float, own: tuple[float, float] = (50.0, 60.0)) -> Any:
    corrupted = {kind: {"a": test - 10, "b": test - 20} for kind in CORRUPTIONS}
    way = {"validation": validation, "test": test, "corrupted": corrupted}
    names = dict(zip("ab", own, strict=True))
    ways = dict.fromkeys(PREDICTIONS, way)
    return {"step_ms": 2.0, "ways": ways, "own": names, "told": names, "alone": names}


def results(training: str, *tried: tuple[float, float, float], seed: int = 0) -> Any:
    """Of (rate, validation accuracy, test accuracy)."""
    return {
        Run("/x/toy.py", "sgd", training, rate, seed, 1): result(validation, test)
        for rate, validation, test in tried
    }


def test_rows_are_of_known_trainings_and_predictions():
    for key, row in ROWS.items():
        assert row.key == key
        assert row.training in TRAININGS
        assert row.prediction in (*PREDICTIONS, "alone")
    assert {row.training for row in ROWS.values()} == set(TRAININGS)
    assert {row.prediction for row in ROWS.values()} == {"alone", *PREDICTIONS}


def test_what_a_prediction_is_fitted_to_stands_beside_its_name():
    for row in ROWS.values():
        fitted = {"gate", "gate16", "pool", "blend"} & {row.prediction} or row.training in (
            "blending",
            "relearning",
            "shuffle",
        )
        assert bool(row.uses) == bool(fitted), row.key


def test_validation_chooses_the_learning_rate_and_the_test_does_not():
    found = results("joint", (0.1, 70.0, 90.0), (0.2, 80.0, 60.0), (0.3, 80.0, 99.0))
    (line,) = lines(found, [ROWS["joint"]])
    assert (line.rate, line.validation, line.accuracy) == (0.2, 80.0, 60.0)
    assert (line.data, line.own, line.told) == ("toy", {"a": 50.0, "b": 60.0}, line.own)
    assert line.corrupted == {kind: {"a": 50.0, "b": 40.0} for kind in CORRUPTIONS}
    assert (line.with_corrupted("noise"), line.reference) == (45.0, 55.0)


def test_each_modality_alone_chooses_its_own_rate():
    found = {
        Run("toy.py", "sgd", "independent", rate, 0, 1): result(0.0, 0.0, own)
        for rate, own in {0.1: (80.0, 20.0), 0.2: (70.0, 30.0)}.items()
    }
    first, second = lines(found, [ROWS["alone"]])
    assert (first.row, first.label, first.rate, first.accuracy) == ("alone:a", "a alone", 0.1, 80.0)
    assert (second.row, second.label, second.rate) == ("alone:b", "b alone", 0.2)


def made(row: str, accuracies: list[float], optimizer: str = "sgd") -> list[Line]:
    return [
        Line(
            "toy",
            optimizer,
            row,
            seed,
            rate=0.1,
            validation=0.0,
            accuracy=each,
            own={"a": 50.0, "b": 60.0},
            # Each seed a point further below the reference.
            corrupted={kind: {"a": 40.0 - seed, "b": 30.0 - seed} for kind in CORRUPTIONS},
            told={"a": 46.0, "b": 44.0},
            step_ms=2.0,
        )
        for seed, each in enumerate(accuracies)
    ]


def difference(row: list[float], joint: list[float]) -> str:
    (found,) = summaries([*made("joint", joint), *made("ogm", row)]).values()
    return found[1].difference


def test_differences_are_paired_by_seed():
    # Far apart between the seeds, one point and a little within each.
    assert difference([11.0, 51.2, 90.8], [10.0, 50.0, 90.0]) == "**+1.0 ± 0.1**"


def test_nothing_is_bold_within_two_standard_errors():
    assert difference([51.0, 49.0, 52.0], [50.0, 50.0, 50.0]) == "+0.7 ± 0.9"
    assert difference([51.0], [50.0]) == "+1.0"  # no error is known
    assert difference([48.0, 48.1], [50.0, 50.0]) == "**-1.9 ± 0.1**"


def test_without_joint_there_is_nothing_to_compare_with():
    (found,) = summaries(made("ogm", [1.0, 2.0])).values()
    assert (found[0].difference, found[0].cost) == ("", "")


def test_csv_has_a_line_per_row_and_seed(tmp_path):
    _report.write_csv([*made("joint", [50.0, 51.0]), *made("alone:a", [2.0])], tmp_path / "x.csv")
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert [row["row"] for row in rows] == ["joint", "joint", "alone:a"]
    found = [rows[0][column] for column in ("accuracy", "own", "told", "noise")]
    assert found == ["50.00", "a=50.00 b=60.00", "a=46.00 b=44.00", "a=40.00 b=30.00"]


def test_what_a_corruption_leaves_stands_beside_being_told():
    (found,) = summaries(made("gate16", [50.0, 60.0, 70.0])).values()
    assert found[0].against_told("noise") == [-10.0, -11.0, -12.0]
    text = _report.markdown(made("gate16", [50.0, 60.0, 70.0]))
    row = f"| {ROWS['gate16'].label} | {ROWS['gate16'].uses} | 60.0 | 45.0 |"
    assert row + 5 * " 34.0 (-11.0 ± 0.6) |" in text
    assert "told" not in _report.markdown(lines(without_corruptions(), [ROWS["joint"]]))


def without_corruptions() -> Any:
    found = results("joint", (0.1, 70.0, 90.0))
    for each in found.values():
        for way in each["ways"].values():
            way.pop("corrupted", None)
        del each["told"]
    return found


LINES = [
    line
    for optimizer in ("sgd", "adamw")
    for row in ROWS
    for line in made(f"{row}:a" if row == "alone" else row, [98.5, 97.4, 99.0], optimizer)
]
LINES = [
    dataclasses.replace(line, corrupted={}, told={}) if line.row == "alone:a" else line
    for line in LINES
]


def test_no_row_hides_what_it_uses(capsys):
    text = _report.markdown(LINES)
    for row in ROWS.values():
        for line in text.splitlines():
            if line.startswith(f"| {row.label} |"):
                assert f"| {row.label} | {row.uses} |" in line
    rows = summaries(LINES)["toy", "sgd"]
    for table in (_report.table, _report.corrupted_table):
        Console(width=80).print(table("toy", "sgd", rows))
        shown = capsys.readouterr().out
        assert "…" not in shown
        assert max(map(len, shown.splitlines())) <= 80
        words = set(shown.replace("│", " ").split())
        for row in ROWS.values():
            assert set(row.uses.split()) <= words
    assert shown.count("34.0") == len(CORRUPTIONS) * (len(rows) - 1)  # not of each alone


def test_the_demo_fits_80_columns(capsys):
    from mmbal_fast import demo

    shown = [
        dataclasses.replace(line, data=data)
        for data, rows in demo.SHOWN.items()
        for line in LINES
        if line.row.partition(":")[0] in rows
    ]
    Console(width=80).print(demo.table(shown))
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("98.3 ± 0.8") == 2 * sum(map(len, demo.SHOWN.values()))


def test_the_plot_has_a_panel_per_data_set_and_a_point_per_row(tmp_path):
    paths = _report.save(LINES, tmp_path)
    assert [path.name for path in paths] == ["results.csv", "table.md", "compare.png"]
    assert paths[2].read_bytes()[:4] == b"\x89PNG"
    above, below = _report.figure(LINES).axes
    assert above.get_title(loc="left") == "toy"
    assert len(above.containers) == 2
    assert len(above.get_yticks()) == len(ROWS) - 2  # without joint, and each alone
    (image,) = below.images
    values = image.get_array()
    assert values.shape == (len(ROWS) - 1, 2 * len(CORRUPTIONS))
    assert set(np.ma.compressed(values).tolist()) == {-11.0}
    clean = [dataclasses.replace(line, corrupted={}, told={}) for line in LINES]
    assert len(_report.figure(clean).axes) == 1


@pytest.mark.parametrize("path", ["README.md", "docs/compare.md", "docs/which_method.md"])
def test_documents_name_rows_that_exist(path):
    file = Path(__file__).parents[2] / path
    for line in file.read_text().splitlines():
        if line.startswith("    mmbal-fast compare") and "--methods" in line:
            named = line.partition("--methods")[2].partition("--")[0].split()
            assert set(named) <= set(ROWS)
