"""The versions that the package claims, tried: ``make matrix``.

For each row a virtual environment below ``build/matrix``, made and tested by ``make test``
with the pins of that row in place of those of ``requirements/constraints.txt``, and removed
afterwards: where there is no torch without CUDA, each takes some 6 GB. A row replaces its line in
``docs/compatibility.csv``.
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
SUITES = ["functional", "integrations", "measures", "methods", "nn", "training"]
SHOWN = ["torch", "lightning", "transformers"]
COLUMNS = ["row", "Python", *SHOWN, "passed", "failed", "skipped", "date", "what failed"]


@dataclass(frozen=True)
class Row:
    """A Python, and the versions that differ from the constraints; None is the newest there is."""

    python: str = "3.11"
    pins: dict[str, str | None] = field(default_factory=dict)


ROWS = {
    **{f"torch {version}": Row(pins={"torch": version}) for version in ("2.10.0", "2.11.0")},
    **{f"torch {version}": Row(pins={"torch": version}) for version in ("2.12.1", "2.13.0")},
    **{f"torch {version}": Row(pins={"torch": version}) for version in ("2.14.1", "2.15.0")},
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
    constraints, report = folder.with_suffix(".txt"), folder.with_suffix(".xml")
    folder.parent.mkdir(parents=True, exist_ok=True)
    constraints.write_text(pinned(row.pins))
    report.unlink(missing_ok=True)
    suites = [f"tests/{suite}" for suite in SUITES if (ROOT / "tests" / suite).is_dir()]
    python = shutil.which(f"python{row.python}")
    line = dict.fromkeys(COLUMNS, "") | {"row": name, "Python": row.python}
    line |= {"date": datetime.date.today().isoformat()}
    if python is None:
        return line | {"failed": "-", "what failed": "no such Python on the machine"}
    command = ["make", "test", f"PYTHON={python}", f"VENV={folder}", f"CONSTRAINTS={constraints}"]
    subprocess.run(
        # What emulates a GPU does not depend on these versions, and takes most of the time.
        [*command, f"ARGS=-q -k 'not emulated' --junitxml={report} {' '.join(suites)}"],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
        check=False,
    )
    if report.exists():
        line |= versions(folder) | counted(report)
    else:
        line |= {"failed": "-", "what failed": "installation or build, see the output"}
    shutil.rmtree(folder, ignore_errors=True)
    return line


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
