"""All runs of a comparison, on several processes; what is done is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mmbal_fast.compare._trial import Run, evaluate, train

Results = dict[Run, dict[str, Any]]
"""What `evaluate` returned of each run."""


def run_all(
    runs: Mapping[Run, Sequence[str]],
    directory: Path,
    *,
    jobs: int,
    corrupted: bool,
    progress: Callable[[int], None],
) -> Results:
    """Trains and evaluates what is not done yet.

    Args:
        runs: what to train, and in which ways to predict from it.
        directory: keeps the weights and the accuracies of each run.
        jobs: processes at a time; with 1, this one.
        corrupted: as for `evaluate`.
        progress: called with the number of runs that are done.

    Returns:
        All of them, in the order of ``runs``; they do not depend on ``jobs``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    out: Results = {}
    if jobs == 1:
        for run, ways in runs.items():
            out[run] = work(run, ways, directory, corrupted)
            progress(len(out))
        return out
    context = get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(min(jobs, max(1, len(runs))), context) as pool:
        futures = {
            pool.submit(work, run, ways, directory, corrupted): run for run, ways in runs.items()
        }
        try:
            for future in as_completed(futures):
                out[futures[future]] = future.result()
                progress(len(out))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return {run: out[run] for run in runs}


def best(tried: Iterable[tuple[Run, dict[str, Any]]], way: str) -> tuple[Run, dict[str, Any]]:
    """The run that predicts the validation samples best in a way; of equals the first."""
    return max(tried, key=lambda each: each[1]["ways"][way]["validation"])


def work(run: Run, ways: Sequence[str], directory: Path, corrupted: bool) -> dict[str, Any]:
    """One run, of which only what is missing is done."""
    weights, accuracies = directory / f"{run.name}.pt", directory / f"{run.name}.json"
    out: dict[str, Any] = json.loads(accuracies.read_text()) if accuracies.exists() else {}
    done = out.get("ways", {})
    missing = [
        way for way in ways if way not in done or (corrupted and "corrupted" not in done[way])
    ]
    if missing:
        if not weights.exists():
            train(run, weights)
        new = evaluate(run, weights, missing, corrupted=corrupted)
        out = {**out, **new, "ways": {**done, **new["ways"]}}
        part = accuracies.with_suffix(".part")
        part.write_text(json.dumps(out))
        part.replace(accuracies)
    return out
