"""``mmbal-fast compare``: every method on the same data, or on your own.

Each row of the table is a way to train and a way to predict; see `_rows`. All rows start from the
same weights, see the same batches for the same number of epochs, and choose their learning rate
from the same grid by their accuracy on validation samples. The test set chooses nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmbal_fast._task import Loaders as Loaders
from mmbal_fast.compare._data import DATA, PACKAGES
from mmbal_fast.compare._data import colored_digits as colored_digits
from mmbal_fast.compare._files import MissingDataError, download
from mmbal_fast.compare._rows import ROWS, Row

if TYPE_CHECKING:
    from mmbal_fast.compare._runs import Results

OPTIMIZERS = ("sgd", "adamw")
MOST_JOBS = 8
"""Default limit of `--jobs`: each process takes about 300 MB."""


def main(argv: Sequence[str] = ()) -> int:
    """Trains, prints the tables, writes CSV, Markdown and plot.

    Args:
        argv: arguments of ``mmbal-fast compare``.

    Returns:
        The exit code: 0, or 2 if a file of a data set is missing.

    Raises:
        ModuleNotFoundError: scikit-learn, matplotlib or rich is not installed.
        SystemExit: by argparse, for arguments it does not know.
    """
    # Here, because the processes that train import this package too, and need no plots.
    from rich.console import Console

    from mmbal_fast.compare import _report

    parser = _parser(list(DATA))
    options = parser.parse_args(argv)
    if (options.module is None) == (not options.data):
        parser.error("give --data or --module")
    rows = [ROWS[key] for key in options.methods]
    files = options.files or options.out / "files"
    try:
        if options.download:
            for data in options.data:
                if data in PACKAGES:
                    download(PACKAGES[data], files)
        results = run(
            dict.fromkeys(options.data or [str(options.module)], rows),
            options.optimizer,
            options.seeds,
            epochs=options.epochs,
            directory=options.out,
            files=files,
            jobs=options.jobs,
        )
    except MissingDataError as error:
        print(f"mmbal-fast compare: {error}", file=sys.stderr)
        return 2
    found = _report.lines(results, rows)
    console = Console()
    for (data, optimizer), each in _report.summaries(found).items():
        console.print(_report.table(data, optimizer, each))
        if (corrupted := _report.corrupted_table(data, optimizer, each)) is not None:
            console.print(corrupted)
    console.print(
        "Mean ± standard deviation over the seeds; difference to joint training with the same "
        "seed ± standard error; time of a step, joint training's being 1. Every row chose its "
        "learning rate by validation samples. told: the modality is left out by who knows which.",
        style="dim",
        highlight=False,
    )
    for path in _report.save(found, options.out):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def run(
    rows: Mapping[str, Sequence[Row]],
    optimizers: Sequence[str],
    seeds: int,
    *,
    directory: Path,
    files: Path,
    jobs: int,
    epochs: int | None = None,
    rates: int | None = None,
    corrupted: bool = True,
) -> Results:
    """Trains and evaluates what the rows need, with a progress bar.

    Args:
        rows: of the table of each data set, by its name, or the path of a module.
        optimizers: of `OPTIMIZERS`.
        seeds: how many; 0, 1, 2, ...
        directory: keeps what is done in ``runs``.
        files: directory of wheels that hold data.
        jobs: processes at a time.
        epochs: of every run; default what the task says.
        rates: how many of the learning rates to try; default all.
        corrupted: also measure what is left when a modality is corrupted.

    Returns:
        What every run came to.

    Raises:
        MissingDataError: a file of a data set is missing.
        TypeError: a module is no `Task`.
        ValueError: likewise.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from mmbal_fast.compare import _trial
    from mmbal_fast.compare._runs import best, run_all

    runs: dict[_trial.Run, list[str]] = {}
    tried: dict[tuple[str, str, int, Row], list[_trial.Run]] = {}
    for each, its_rows in rows.items():
        task = _trial.load_task(each, str(files))
        with torch.random.fork_rng(devices=[]):
            _trial.setting(task, 0)  # what is wrong with it is known before anything is trained
        length = getattr(task, "epochs", _trial.EPOCHS) if epochs is None else epochs
        for optimizer in optimizers:
            grid = getattr(task, "rates", _trial.RATES)[optimizer][:rates]
            for seed in range(seeds):
                for row in its_rows:
                    for rate in grid:
                        spec = _trial.Run(
                            each, optimizer, row.training, rate, seed, length, str(files)
                        )
                        runs.setdefault(spec, []).append(row.way)
                        tried.setdefault((each, optimizer, seed, row), []).append(spec)
    with Progress(
        *Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)
    ) as bar:

        def run_with_bar(runs: Mapping[_trial.Run, Sequence[str]], corrupted: bool) -> Results:
            task_id = bar.add_task("corrupted" if corrupted else "runs", total=len(runs))
            return run_all(
                runs,
                directory / "runs",
                jobs=jobs,
                corrupted=corrupted,
                progress=lambda done: bar.update(task_id, completed=done),
            )

        results = run_with_bar(runs, corrupted=False)
        if corrupted:  # the longest part, so only of the runs that the tables show
            chosen: dict[_trial.Run, list[str]] = {}
            for (*_, row), specs in tried.items():
                if row.prediction != "alone":
                    spec, _ = best([(each, results[each]) for each in specs], row.way)
                    chosen.setdefault(spec, []).append(row.way)
            results |= run_with_bar(chosen, corrupted=True)
        return results


def _parser(data: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmbal-fast compare",
        description="Train and predict with every method, on real data or your own: tables, a "
        "plot, a CSV. What is done is kept in --out, and not done again.",
    )
    parser.add_argument(
        "--data", nargs="+", choices=data, default=[], metavar="NAME", help=f"of {', '.join(data)}"
    )
    parser.add_argument(
        "--module", type=_file, metavar="FILE", help="your own model and data: docs/compare.md"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(ROWS),
        default=list(ROWS),
        metavar="ROW",
        help=f"default all of {', '.join(ROWS)}",
    )
    parser.add_argument(
        "--optimizer", type=_optimizers, default=["sgd"], help="sgd, adamw or sgd,adamw [sgd]"
    )
    parser.add_argument("--seeds", type=number, default=5, metavar="N", help="[%(default)s]")
    parser.add_argument("--epochs", type=number, metavar="N", help="default what the data say")
    parser.add_argument("--out", type=Path, default=Path("compare-results"), help="[%(default)s]")
    parser.add_argument("--files", type=Path, metavar="DIR", help="with wheels [OUT/files]")
    parser.add_argument(
        "--download", action="store_true", help="fetch wheels that hold data with pip"
    )
    parser.add_argument(
        "--jobs", type=number, default=default_jobs(), metavar="N", help="processes [%(default)s]"
    )
    return parser


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"must be a Python file (got {text})")
    return path.resolve()


def _optimizers(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in OPTIMIZERS]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(OPTIMIZERS)} (got {unknown[0]})")
    return names


def number(text: str) -> int:
    """A whole number from 1 on, of the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on (got {text})")
    return value


number.__name__ = "int"  # argparse names it where the text is no number


def default_jobs() -> int:
    """A process for each core, up to `MOST_JOBS`."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MOST_JOBS)
    return min(os.cpu_count() or 1, MOST_JOBS)
