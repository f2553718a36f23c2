"""The loop that trains one row once, and the one that trains all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized

import torch

from mmbal_fast.demo import _digits
from mmbal_fast.demo._digits import Samples
from mmbal_fast.demo._learner import Learner, Settings, Setup
from mmbal_fast.demo._recorder import Recorder
from mmbal_fast.demo._rows import ROWS


@dataclass(frozen=True)
class Trial:
    """One row trained with one seed."""

    row: str
    seed: int
    accuracy: float
    """Of the test set after the last epoch, in per cent."""
    step_seconds: float
    """Median time of a training step, whatever the method added included."""
    added_seconds: float
    """Median time that the method added to a step; 0 if nothing."""
    curves: dict[str, list[float]]
    """By name, spread evenly over the epochs; see `Recorder.log`."""
    measures: dict[str, float]
    """See `Recorder.measures`."""


def run(row: str, seed: int, settings: Settings, tick: Callable[[], None]) -> Trial:
    """Trains a row once, on one thread: batches this small gain nothing from more.

    Everything that is random depends on the seed alone, and the caller's generators and thread
    count come back as they were.

    Args:
        row: a key of `ROWS`.
        seed: of data, initial weights, order of the batches, and noise.
        settings: what holds for all rows.
        tick: called after each epoch.

    Returns:
        What it came to.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _run(row, seed, settings, tick)
    finally:
        torch.set_num_threads(threads)


def _run(row: str, seed: int, settings: Settings, tick: Callable[[], None]) -> Trial:
    train, test = _digits.load(seed)
    kept = len(train) - ROWS[row].held_out
    train, validation = train[:kept], train[kept:]
    recorder = Recorder()
    learner = ROWS[row].learner(Setup(train, validation, settings, seed, recorder))
    order = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        shuffled = train[torch.randperm(kept, generator=order)]
        for start in range(0, kept, settings.batch_size):
            batch = shuffled[start : start + settings.batch_size]
            with recorder.step():
                learner.step(batch)
        learner.end_epoch()
        accuracies = _accuracies(learner, test)
        values = torch.tensor(list(accuracies.values()), dtype=torch.float64)
        recorder.log("accuracy", values, list(accuracies))
        tick()
    return Trial(
        row,
        seed,
        accuracies["model"],
        recorder.step_seconds(),
        recorder.added_seconds(),
        recorder.curves(),
        recorder.measures,
    )


@torch.no_grad()
def _accuracies(learner: Learner, samples: Samples) -> dict[str, float]:
    learner.model.eval()
    predictions = learner.predict(samples)
    learner.model.train()
    return {
        name: 100.0 * (logits.argmax(dim=1) == samples.label).float().mean().item()
        for name, logits in predictions.items()
    }


def run_all(
    rows: Sequence[str],
    seeds: int,
    settings: Settings,
    *,
    jobs: int,
    progress: Callable[[int], None],
) -> list[Trial]:
    """Trains every row with every seed.

    Args:
        rows: keys of `ROWS`.
        seeds: how many; 0, 1, 2, ...
        settings: what holds for all rows.
        jobs: processes at a time; with 1, this one.
        progress: called now and then with the number of epochs done.

    Returns:
        A trial for each row and seed, in that order. Their accuracies do not depend on ``jobs``.
    """
    tasks = [(row, seed) for row in rows for seed in range(seeds)]
    if jobs == 1:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            progress(done)

        return [run(row, seed, settings, tick) for row, seed in tasks]

    context = get_context("spawn")  # torch's threads do not survive a fork
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(
        min(jobs, len(tasks)), context, initializer=_share, initargs=(counter,)
    ) as pool:
        futures = [pool.submit(_work, row, seed, settings) for row, seed in tasks]
        pending = set(futures)
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.2)
                progress(counter.value)
                for future in finished:
                    future.result()  # a failed run ends the demo, not the others' patience
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [future.result() for future in futures]


_counter: Synchronized[int]


def _share(counter: Synchronized[int]) -> None:
    global _counter
    _counter = counter


def _count() -> None:
    with _counter.get_lock():
        _counter.value += 1


def _work(row: str, seed: int, settings: Settings) -> Trial:
    return run(row, seed, settings, _count)
