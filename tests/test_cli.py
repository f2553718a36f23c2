from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mmbal_fast
from mmbal_fast.cli import main


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "info   what is installed"),
        (["--version"], 0, f"mmbal-fast {mmbal_fast.__version__}"),
        (["demo", "--help"], 0, "--alpha"),
        (["info", "--help"], 0, "--json"),
        (["bench", "--help"], 0, "mmbal-fast bench"),
        ([], 2, "command"),
        (["train"], 2, "train"),
        (["info", "--loud"], 2, "--loud"),
        (["demo", "--rows", "audio"], 2, "'audio'"),
        (["demo", "--seeds", "0"], 2, "must be a number from 1 on (got 0)"),
        (["demo", "--seeds", "many"], 2, "invalid int value: 'many'"),
        (["demo", "--alpha", "-1"], 2, "must be a number from 0 on (got -1)"),
        (["demo", "--alpha", "nan"], 2, "must be a number from 0 on (got nan)"),
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
        if name.startswith("mmbal_fast.demo") or name.partition(".")[0] == package:
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


def test_demo_end_to_end(tmp_path, capsys):
    assert main(["demo", "--quick", "--epochs", "1", "--jobs", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for label in ("gray alone", "colour alone", "joint", "joint + OGM", "joint + OGM-GE"):
        assert f"│ {label} " in out
    assert "100%" in out
    assert "holds out training images" in " ".join(out.split())
    path = Path(out.strip().rpartition("curves: ")[2])
    assert path.parent == tmp_path
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_demo_takes_rows_and_seeds(tmp_path, capsys):
    arguments = ["demo", "--rows", "color", "--seeds", "2", "--epochs", "1", "--jobs", "1"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "│ colour alone " in out
    assert "±" in out
    assert "│ joint" not in out


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
