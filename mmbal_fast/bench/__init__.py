"""``mmbal-fast bench``: times the training step against what people run today."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mmbal_fast.bench import _methods, _pairs, _report
from mmbal_fast.bench import _providers as names
from mmbal_fast.bench._measure import Counts, Provider, count, interleaved
from mmbal_fast.bench._workloads import FEATURES, GRADIENTS, SCORING, Features, Gradients, Scoring

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES = [2**10, 2**13, 2**16, 2**19, 2**22, 2**25, 200_000_000]
AV = GRADIENTS["av-resnet18"]
TENSORS = [1, 4, 16, 64, 250, 1000, 4000]


@dataclass(frozen=True)
class Case:
    """A workload whose providers are timed together."""

    workload: Gradients | Scoring | Features
    dtype: torch.dtype
    noise: bool = False
    compiled: bool = False
    part: str = "step"
    """Or "noise" or "moments", which a step consists of, or a step of `_methods.PARTS` or
    `_pairs.PARTS`."""
    seconds: float = 4.0
    threads: int | None = None
    """Of the CPU; default those that torch is set to."""
    cold: bool = False
    """Whether the cache is emptied before each run, as in training; else it holds what fits."""

    @property
    def name(self) -> str:
        """As the results call it."""
        part = "" if self.part == "step" else f"{self.part} "
        return f"{part}{self.workload.name}{', cold' if self.cold else ''}"

    @property
    def beside_usual(self) -> bool:
        """Whether float32 and contiguous gradients are timed too, to compare elements with."""
        work = self.workload
        same = self.noise and isinstance(work, Gradients) and work.shapes == AV.shapes
        return same and (self.dtype != torch.float32 or work != AV)

    @property
    def elements(self) -> int:
        """How many are read."""
        work = self.workload
        if not isinstance(work, Scoring):
            return work.elements
        return work.modalities * work.batch * work.classes

    @property
    def least_bytes(self) -> int:
        """Each input read once, each output written once."""
        steps = ("step", *_methods.PARTS)
        times = 2 if isinstance(self.workload, Gradients) and self.part in steps else 1
        if isinstance(self.workload, Features):
            times = 4  # forward and backward
        if self.part in _pairs.PARTS:
            times = _pairs.PARTS[self.part][0]
        return self.elements * self.dtype.itemsize * times

    def providers(self, device: torch.device) -> list[Provider]:
        """Everything that does this."""
        if isinstance(self.workload, Scoring):
            return names.scoring(self.workload, self.dtype, device, self.workload.batch <= 64)
        if isinstance(self.workload, Features):
            return _methods.dropping(self.workload, self.dtype, device)
        if self.part in _methods.PARTS:
            return _methods.PARTS[self.part](self.workload, self.dtype, device)
        if self.part in _pairs.PARTS:
            return _pairs.PARTS[self.part][1](self.workload, self.dtype, device)
        if self.part != "step":
            return names.parts(self.workload, self.dtype, device)[self.part]
        every = names.step(self.workload, self.dtype, device, self.noise, self.compiled)
        if self.beside_usual:
            usual = names.step(AV, torch.float32, device, True, False)
            every += [replace(each, name=names.USUAL) for each in usual if each.name == names.OURS]
        if self.workload.name.startswith("scale-"):
            return [each for each in every if each.name in (names.OURS, names.FLOOR)]
        return every


def quick_cases() -> Iterator[Case]:
    """What is worth a minute."""
    yield Case(AV, torch.float32, noise=True)
    yield Case(AV, torch.float32, seconds=2)
    yield Case(AV, torch.bfloat16, noise=True, seconds=2)
    yield Case(GRADIENTS["av-resnet18 channels_last"], torch.float32, noise=True, seconds=2)
    yield Case(GRADIENTS["tiny"], torch.float32, noise=True, seconds=1)
    yield Case(Scoring(2, 64, 310), torch.float32, seconds=1)
    for part in _methods.PARTS:
        yield Case(AV, torch.float32, part=part, seconds=1)
    for features in FEATURES:
        yield Case(features, torch.float32, seconds=1)
    for part in _pairs.PARTS:
        yield Case(AV, torch.float32, part=part, seconds=2)
    yield from one_core_cases(seconds=2)


def one_core_cases(seconds: float = 4.0) -> Iterator[Case]:
    """The step on one thread, and what it consists of."""
    yield Case(AV, torch.float32, noise=True, seconds=seconds, threads=1)
    for part in ("noise", "moments"):
        yield Case(AV, torch.float32, part=part, seconds=seconds, threads=1)


def all_cases(compiled: bool, device: torch.device) -> Iterator[Case]:
    """Everything."""
    cuda = device.type == "cuda"
    for workload in GRADIENTS.values():
        for dtype in DTYPES:
            for noise in (True, False):
                compare = compiled and workload == AV and dtype == torch.float32
                for cold in (False, True) if cuda and workload == AV else (False,):
                    yield Case(workload, dtype, noise, compare, cold=cold)
    for part in ("noise", "moments"):
        for dtype in DTYPES:
            yield Case(AV, dtype, part=part)
    for part in _methods.PARTS:
        yield Case(AV, torch.float32, part=part)
    for features in FEATURES:
        yield Case(features, torch.float32)
    for part in _pairs.PARTS:
        yield Case(AV, torch.float32, part=part)
    if not cuda:
        yield from one_core_cases()
    for scoring in SCORING:
        yield Case(scoring, torch.float32, seconds=1)
    yield Case(Scoring(2, 64, 310), torch.float32, seconds=1, cold=True)
    for elements in SCALES:
        half = ((elements // 2,),)
        workload = Gradients(f"scale-elements-{elements}", (half, half))
        yield Case(workload, torch.float32, noise=True, seconds=1)
    for tensors in TENSORS:
        shapes = ((4096,),) * ((tensors + 1) // 2), ((4096,),) * max(1, tensors // 2)
        yield Case(Gradients(f"scale-tensors-{tensors}", shapes), torch.float32, True, seconds=1)


def run(cases: Sequence[Case], device: torch.device, console: Console) -> list[_report.Row]:
    """Times the cases, with a progress bar.

    Args:
        cases: what to time.
        device: where.
        console: where the bar goes.

    Returns:
        A row for each provider of each case.
    """
    rows: list[_report.Row] = []
    threads = torch.get_num_threads()
    columns = (TextColumn("{task.description:40}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("copy bandwidth", total=len(cases))
            copies: dict[int, float] = {}  # copy bandwidth by threads
            for case in cases:
                progress.update(task, description=f"{case.name} {str(case.dtype)[6:]}")
                used = case.threads or threads
                torch.set_num_threads(used)
                if used not in copies:
                    copies[used] = names.copy_bandwidth(
                        device, lambda each: interleaved([each], device, 1.0)[each.name].median
                    )
                providers = case.providers(device)
                timings = interleaved(providers, device, case.seconds, case.cold)
                for provider in providers:
                    counts = Counts()
                    if provider.name not in (names.COMPILED, names.GRAPH):
                        provider.restore()
                        counts = count(provider.run)
                    rows.append(
                        _report.row(
                            case.name,
                            provider.name,
                            device,
                            case.dtype,
                            case.noise,
                            case.elements,
                            case.least_bytes,
                            timings[provider.name],
                            counts,
                            copies[used],
                        )
                    )
                progress.advance(task)
    finally:
        torch.set_num_threads(threads)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Times, prints a table, writes a CSV file and a picture.

    Args:
        argv: arguments after ``bench``.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(
        prog="mmbal-fast bench", description="Times the training step against what people run."
    )
    parser.add_argument("--quick", action="store_true", help="the main workload, under a minute")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of the CPU; default torch's")
    parser.add_argument("--only", help="workloads whose name holds this text")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder to write")
    options = parser.parse_args(argv)
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be from 1 on (got {options.threads})")
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    cases = list(quick_cases() if options.quick else all_cases(not options.no_compile, device))
    if options.only:
        cases = [case for case in cases if options.only in case.name]
        if not cases:
            parser.error(f"--only must be part of a workload's name (got {options.only!r})")
    console = Console()
    if not console.is_terminal:
        console.width = 140
    rows = run(cases, device, console)
    console.print(_report.table(rows))
    stem = f"{device.type}-{torch.get_num_threads()}-threads{'-quick' if options.quick else ''}"
    if device.type == "cuda":
        stem = torch.cuda.get_device_name(device).lower().replace(" ", "-")
    _report.write_csv(rows, options.out / f"{stem}.csv")
    _report.draw(rows, options.out / f"{stem}.png")
    console.print(f"wrote {options.out / stem}.csv and {options.out / stem}.png", soft_wrap=True)
    return 0
