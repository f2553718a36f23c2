"""``mmbal-fast demo``: modulation at work on real images, within minutes.

Handwritten digits, each as a gray image and as one in a colour that gives its label away in
training but not in the test: a network that sees both leans on the colour, which is easier to
learn. The demo trains with and without modulation, and prints what comes out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mmbal_fast import _backend

MOST_JOBS = 8
"""Default limit of `--jobs`: each process takes about 300 MB."""


def main(argv: Sequence[str] = ()) -> int:
    """Trains, prints the table, writes the plot.

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
    from rich.progress import Progress

    from mmbal_fast.demo import _report
    from mmbal_fast.demo._learner import Settings
    from mmbal_fast.demo._rows import ROWS
    from mmbal_fast.demo._training import run_all

    options = _parser(list(ROWS)).parse_args(argv)
    seeds = options.seeds or (1 if options.quick else 3)
    epochs = options.epochs or (2 if options.quick else Settings.epochs)
    console = Console()
    with Progress(*Progress.get_default_columns(), console=console) as bar:
        task = bar.add_task("training", total=len(options.rows) * seeds * epochs)
        trials = run_all(
            options.rows,
            seeds,
            Settings(epochs=epochs, alpha=options.alpha),
            jobs=options.jobs,
            progress=lambda done: bar.update(task, completed=done),
        )
    results = _report.group(trials)
    paths = _report.save(results, epochs, options.out)
    console.print(_report.table(results))
    console.print(_notes(seeds, epochs), style="dim", highlight=False)
    for path in paths:
        console.print(f"curves: {path}", soft_wrap=True, highlight=False)
    return 0


def _notes(seeds: int, epochs: int) -> str:
    native = _backend.native
    kernels = "plain PyTorch" if native is None else f"native kernels, {native.cpu_isa()}"
    deviation = " ± standard deviation" if seeds > 1 else ""
    return (
        f"Mean{deviation} over {seeds} seed{'s' * (seeds > 1)}, each with its own split, colours "
        f"and initial weights. The network after epoch {epochs} counts: nothing is chosen by the "
        "test set, and a row that needs validation data holds out training images for it. "
        f"Times: CPU time of the median step, on one thread ({kernels})."
    )


def _parser(rows: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmbal-fast demo",
        description="Train on colored digits with and without modulation: a table and a plot.",
    )
    at_least_1, at_least_0 = _number(int, 1), _number(float, 0)
    parser.add_argument("--seeds", type=at_least_1, metavar="N", help="runs of each row [3]")
    parser.add_argument("--epochs", type=at_least_1, metavar="N", help="epochs of each run [20]")
    parser.add_argument("--quick", action="store_true", help="1 seed and 2 epochs, to try it out")
    parser.add_argument(
        "--rows", nargs="+", choices=rows, default=rows, metavar="ROW", help=f"of {', '.join(rows)}"
    )
    parser.add_argument(
        "--alpha", type=at_least_0, default=1.0, help="strength of the modulation [%(default)s]"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-results"),
        help="directory for the plot [%(default)s]",
    )
    parser.add_argument(
        "--jobs", type=at_least_1, default=_jobs(), metavar="N", help="processes [%(default)s]"
    )
    return parser


def _number(kind: Callable[[str], float], least: int) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a number from {least} on (got {text})")
        return value

    number.__name__ = kind.__name__  # argparse names it where the text is no number
    return number


def _jobs() -> int:
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MOST_JOBS)
    return min(os.cpu_count() or 1, MOST_JOBS)
