"""``mmbal-fast demo``: what balances two modalities, and where it fails, within minutes.

A part of ``mmbal-fast compare``: handwritten digits, each as a gray image and as one in a colour
that gives its label away in training but not in the test, so that a network that sees both leans on
the colour, which is easier to learn. Beside it the control: the colour is a patch without shape.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmbal_fast import _backend
from mmbal_fast.compare import OPTIMIZERS, default_jobs, number, run
from mmbal_fast.compare._rows import ROWS

if TYPE_CHECKING:
    from rich.table import Table

    from mmbal_fast.compare._report import Line

DATA = {"colored-digits": "colored", "flat-digits": "flat"}
_BALANCED = ("unimodal", "unimodal-mean", "gate16", "shuffle")
SHOWN = {
    "colored-digits": ("alone", "joint", "ogm-ge", *_BALANCED),
    "flat-digits": ("joint", *_BALANCED),
}
"""Rows on each data set. The control's gray images are the same."""


def main(argv: Sequence[str] = ()) -> int:
    """Trains, prints the table, writes CSV and plot.

    Args:
        argv: arguments of ``mmbal-fast demo``.

    Returns:
        The exit code, 0.

    Raises:
        ModuleNotFoundError: scikit-learn, matplotlib or rich is not installed.
        SystemExit: by argparse, for arguments it does not know.
    """
    # Here, because the processes that train import this package too, and need no plots.
    from rich.console import Console

    from mmbal_fast.compare import _report

    options = _parser().parse_args(argv)
    seeds = options.seeds or (1 if options.quick else 5)
    rows = {data: [ROWS[key] for key in keys] for data, keys in SHOWN.items()}
    results = run(
        rows,
        OPTIMIZERS,
        seeds,
        epochs=2 if options.quick else None,
        directory=options.out,
        files=options.out,
        jobs=options.jobs,
        rates=1,
        corrupted=False,
    )
    lines = []
    for data, shown in rows.items():
        own = {each: done for each, done in results.items() if each.data == data}
        lines += _report.lines(own, shown)
    console = Console()
    console.print(table(lines))
    console.print(_notes(seeds), style="dim", highlight=False)
    for path in _report.save(lines, options.out):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def table(lines: Sequence[Line]) -> Table:
    """Accuracy of each row on both data sets with both optimizers; fits 80 columns."""
    from rich.table import Table

    from mmbal_fast.compare._report import NAMES, spread

    out = Table(title="test accuracy, %", title_justify="left")
    out.add_column("row, and what it uses", max_width=24)
    cells = [(data, optimizer) for data in DATA for optimizer in OPTIMIZERS]
    for data, optimizer in cells:
        out.add_column(f"{DATA[data]}\n{NAMES[optimizer]}", justify="right", no_wrap=True)
    for row in dict.fromkeys(line.row for line in lines):
        found = [line for line in lines if line.row == row]
        values = [
            [line.accuracy for line in found if (line.data, line.optimizer) == cell]
            for cell in cells
        ]
        uses = f"\n[dim]{found[0].uses}[/dim]" if found[0].uses else ""
        out.add_row(found[0].label + uses, *(spread(each) if each else "" for each in values))
    return out


def _notes(seeds: int) -> str:
    native = _backend.native
    kernels = "plain PyTorch" if native is None else f"native kernels, {native.cpu_isa()}"
    deviation = " ± standard deviation" if seeds > 1 else ""
    return (
        f"Mean{deviation} over {seeds} seed{'s' * (seeds > 1)}, each with its own split, colours "
        "and initial weights. colored: the digit in a colour, right in training 95 % of the time, "
        "random in the test; flat: a patch of that colour, the control. Nothing is chosen by the "
        f"test set ({kernels})."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmbal-fast demo",
        description="Train on colored digits with and without balancing: a table and a plot.",
    )
    parser.add_argument("--seeds", type=number, metavar="N", help="runs of each row [5]")
    parser.add_argument("--quick", action="store_true", help="1 seed and 2 epochs, to try it out")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-results"), help="directory [%(default)s]"
    )
    parser.add_argument(
        "--jobs", type=number, default=default_jobs(), metavar="N", help="processes [%(default)s]"
    )
    return parser
