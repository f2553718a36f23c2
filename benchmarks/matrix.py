"""The versions that the package claims, tried: ``make matrix``.

For each row an environment below ``build/matrix`` with the pins of that row in place of those of
``requirements/constraints.txt``. The wheel of ``dist`` is installed into it while the search path
holds no compiler; then run ``mmbal-fast info`` and the tests, of a copy of ``tests`` that cannot
see the sources. An environment that is made here is removed afterwards: most torch wheels bring
CUDA, 6 GB each. One that is there already (``build/matrix/torch-2.10.0``, ...) is used as it is and
stays. A row replaces its line in ``docs/compatibility.csv``.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "matrix"
TABLE = ROOT / "docs" / "compatibility.csv"
COPIED = ["tests", "docs", "examples", "pyproject.toml", "README.md"]
SUITES = [
    *(f"tests/{name}" for name in ("functional", "integrations", "measures", "methods", "nn")),
    "tests/training",
    "tests/docs/test_pages.py::test_the_code_of_a_page_runs[README.md]",
]
# What emulates a GPU does not depend on these versions, and takes most of the time.
SELECTED = ["-m", "not slow and not in_one_launch", "-k", "not emulated"]
TOOLS = ["pytest", "hypothesis", "numpy", "scipy", "tensorboard", "matplotlib", "scikit-learn"]
SHOWN = ["torch", "lightning", "transformers"]
COLUMNS = ["row", "Python", *SHOWN, "passed", "failed", "skipped", "date", "what failed"]


@dataclass(frozen=True)
class Row:
    """A Python, and the versions that differ from the constraints; None is the newest there is."""

    python: str = "3.11"
    pins: dict[str, str | None] = field(default_factory=dict)


TORCH = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
ROWS = {
    # Each has bounds of its own for setuptools.
    **{f"torch {version}": Row(pins={"torch": version, "setuptools": None}) for version in TORCH},
    **{f"Python {version}": Row(python=version) for version in ("3.10", "3.12", "3.13", "3.14")},
    "oldest frameworks": Row(pins={"lightning": "2.5.0", "transformers": "5.6.0"}),
    "newest frameworks": Row(pins={"lightning": None, "transformers": None, "accelerate": None}),
}


def main() -> int:
    """Tries the rows that were asked for; 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"default all: {', '.join(ROWS)}")
    chosen = parser.parse_args().rows or list(ROWS)
    if unknown := [name for name in chosen if name not in ROWS]:
        parser.error(f"rows must be of {', '.join(ROWS)} (got {', '.join(unknown)})")
    failed = False
    for name in chosen:
        print(f"---- {name}", flush=True)
        line = try_row(name, ROWS[name])
        record(line)
        failed = failed or line["failed"] != "0"
    return int(failed)


def try_row(name: str, row: Row) -> dict[str, str]:
    """Runs the tests of a row; what its line says."""
    folder = BUILD / name.replace(" ", "-")
    line = dict.fromkeys(COLUMNS, "") | {"row": name, "Python": row.python, "failed": "-"}
    line |= {"date": datetime.date.today().isoformat()}
    wheel = next((ROOT / "dist").glob(f"*-cp{row.python.replace('.', '')}-*.whl"), None)
    if wheel is None:
        return line | {"what failed": f"no wheel in dist/ for Python {row.python}: make wheels"}
    made = not folder.exists()
    try:
        install(wheel, folder, row, made=made)
        line |= versions(folder)
        return line | tried(folder)
    except subprocess.CalledProcessError as error:
        return line | {"what failed": " ".join(map(str, error.cmd[1:4]))}
    finally:
        if made:
            shutil.rmtree(folder, ignore_errors=True)


def install(wheel: Path, folder: Path, row: Row, *, made: bool) -> None:
    """Puts the wheel and what its tests need into an environment without a compiler."""
    if made:
        constraints = BUILD / "constraints.txt"
        constraints.parent.mkdir(parents=True, exist_ok=True)
        constraints.write_text(pinned(row.pins))
        subprocess.run([f"python{row.python}", "-m", "venv", folder], check=True)
        needed = [f"{wheel}[lightning,transformers]", *TOOLS]
        pip(folder, "-c", str(constraints), *needed)
    else:
        pip(folder, "--no-deps", "--force-reinstall", str(wheel))


def pip(folder: Path, *arguments: str) -> None:
    """Runs ``pip install`` where no compiler is found."""
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *arguments]
    subprocess.run(command, env=without_compiler(folder), check=True)


def without_compiler(folder: Path) -> dict[str, str]:
    """An environment of variables whose search path is that of the virtual environment alone."""
    return {**os.environ, "PATH": str(folder / "bin")}


def tried(folder: Path) -> dict[str, str]:
    """Runs ``mmbal-fast info`` and the tests; their part of the line."""
    python = folder / "bin" / "python"
    tree, report = BUILD / "tree", BUILD / f"{folder.name}.xml"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    report.unlink(missing_ok=True)
    for name in COPIED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tree / name)
    subprocess.run(
        [python, "-m", "mmbal_fast", "info"], cwd=tree, env=without_compiler(folder), check=True
    )
    tests = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", *SELECTED, *SUITES]
    subprocess.run([python, "-m", "pytest", *tests], cwd=tree, check=False)
    if not report.exists():
        return {"what failed": "the tests do not start, see the output"}
    return counted(report)


def pinned(pins: dict[str, str | None]) -> str:
    """The constraints with other pins."""
    lines = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if re.split("==", line)[0] not in pins]
    return "\n".join([*kept, *(f"{name}=={pin}" for name, pin in pins.items() if pin), ""])


def versions(folder: Path) -> dict[str, str]:
    """What the environment holds."""
    code = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    done = subprocess.run(
        [folder / "bin" / "python", "-c", code, *SHOWN], capture_output=True, text=True, check=True
    )
    return dict(zip(SHOWN, done.stdout.split(), strict=True))


def counted(report: Path) -> dict[str, str]:
    """Numbers of tests, and the names of those that failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": str(len(cases) - len(bad) - skipped),
        "failed": str(len(bad)),
        "skipped": str(skipped),
        "what failed": ", ".join(sorted({str(case.get("name")).partition("[")[0] for case in bad})),
    }


def record(line: dict[str, str]) -> None:
    """Puts a line in the place of an older one of its row."""
    lines = list(csv.DictReader(TABLE.read_text().splitlines())) if TABLE.exists() else []
    lines = [each for each in lines if each["row"] != line["row"]]
    lines = sorted([*lines, line], key=lambda each: list(ROWS).index(each["row"]))
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    sys.exit(main())
