"""The results: rows of a CSV file, a table and a picture."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib as mpl
import torch
from rich.table import Table

from mmbal_fast import _backend
from mmbal_fast._version import __version__
from mmbal_fast.bench import _methods, _pairs
from mmbal_fast.bench import _providers as names
from mmbal_fast.bench._measure import Counts, Timing

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes


@dataclass(frozen=True)
class Row:
    """One provider on one workload."""

    workload: str
    provider: str
    device: str
    threads: int
    dtype: str
    noise: bool
    elements: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    gb_per_s: float
    """Of the bytes that must move at least: each input read once, each output written once."""
    percent_of_copy: float
    launches: int
    synchronisations: int
    peak_extra_bytes: int
    repetitions: int
    mmbal_fast: str
    torch: str
    cpu_isa: str
    date: str
    machine: str


def machine_name(device: torch.device) -> str:
    """The processor that was measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def row(
    workload: str,
    provider: str,
    device: torch.device,
    dtype: torch.dtype,
    noise: bool,
    elements: int,
    least_bytes: int,
    timing: Timing,
    counts: Counts,
    copy: float,
) -> Row:
    """A row from what was measured; ``copy`` is the copy bandwidth in bytes per second."""
    rate = least_bytes / timing.median
    return Row(
        workload=workload,
        provider=provider,
        device=device.type,
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        noise=noise,
        elements=elements,
        median_ms=round(timing.median * 1e3, 5),
        p20_ms=round(timing.quantile(0.2) * 1e3, 5),
        p80_ms=round(timing.quantile(0.8) * 1e3, 5),
        gb_per_s=round(rate / 1e9, 3),
        percent_of_copy=round(100 * rate / copy, 1),
        launches=counts.launches,
        synchronisations=counts.synchronisations,
        peak_extra_bytes=counts.extra_bytes,
        repetitions=len(timing.seconds),
        mmbal_fast=__version__,
        torch=torch.__version__,
        cpu_isa=_backend.native.cpu_isa() if _backend.native is not None else "reference",
        date=datetime.date.today().isoformat(),
        machine=machine_name(device),
    )


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Writes the rows with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(each) for each in rows)


def _groups(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Rows by what was done, which all providers of a case have in common, and by provider."""
    groups: dict[str, dict[str, Row]] = {}
    usual = max((each.threads for each in rows), default=1)
    for each in rows:
        label = f"{each.workload} {each.dtype}{' noise' if each.noise else ''}"
        if each.threads != usual:
            label += f", {each.threads} thread{'s' if each.threads > 1 else ''}"
        groups.setdefault(label, {})[each.provider] = each
    return groups


def table(rows: Sequence[Row]) -> Table:
    """A line for each provider, with how many times as long as ours it takes."""
    result = Table(
        title="median time, 20th to 80th percentile; x ours: times as long as mmbal_fast",
        title_justify="left",
    )
    for name in ("workload", "provider"):
        result.add_column(name, no_wrap=True)
    for name in ("ms", "p20 - p80", "x ours", "GB/s", "% of copy", "launches", "syncs"):
        result.add_column(name, justify="right", no_wrap=True)
    for label, group in _groups(rows).items():
        ours = group[names.OURS]
        for index, (provider, each) in enumerate(group.items()):
            result.add_row(
                label if index == 0 else "",
                provider,
                f"{each.median_ms:.3f}",
                f"{each.p20_ms:.3f} - {each.p80_ms:.3f}",
                f"{each.median_ms / ours.median_ms:.2f}",
                f"{each.gb_per_s:.2f}",
                f"{each.percent_of_copy:.0f}",
                str(each.launches),
                str(each.synchronisations),
                end_section=index == len(group) - 1,
            )
    return result


COLOURS = {
    names.OURS: "#0072B2",
    names.GRAPH: "#56B4E9",
    names.USUAL: "#A6CEE3",
    names.PUBLISHED: "#D55E00",
    names.PLAIN: "#E69F00",
    names.COMPILED: "#CC79A7",
    names.FOREACH: "#009E73",
    names.FLOOR: "#999999",
    _methods.SCALED: "#A6CEE3",
    _methods.DROPOUT: "#A6CEE3",
}
_METHODS = ("drop-", *(f"{part} " for part in (*_methods.PARTS, *_pairs.PARTS)))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of the times of each workload, and the two scaling curves where they were measured."""
    panels: dict[str, list[Row]] = {
        "step with noise": [],
        "step without noise": [],
        "other methods": [],
        "noise and moments alone": [],
        "scores: modalities x batch x classes": [],
    }
    scaling: list[Row] = []
    for each in rows:
        if each.workload.startswith("scale-"):
            scaling.append(each)
        elif each.workload.startswith("score-"):
            panels["scores: modalities x batch x classes"].append(each)
        elif each.workload.startswith(_METHODS):
            panels["other methods"].append(each)
        elif each.workload.startswith(("noise ", "moments ")):
            panels["noise and moments alone"].append(each)
        else:
            panels["step with noise" if each.noise else "step without noise"].append(each)
    shown = {title: found for title, found in panels.items() if found}
    count = len(shown) + bool(scaling)
    figure, axes = plt.subplots(count, 1, figsize=(15, 5 * count), squeeze=False)
    for axis, (title, found) in zip(axes[:, 0], shown.items(), strict=False):
        _bars(axis, found, title)
    if scaling:
        _curves(axes[-1, 0], scaling)
    first = rows[0]
    figure.suptitle(f"{first.machine}, {first.threads} threads, torch {first.torch}")
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _bars(axis: Axes, rows: Sequence[Row], title: str) -> None:
    groups = _groups(rows)
    shown = list(dict.fromkeys(each.provider for each in rows))
    width = 0.8 / len(shown)
    for offset, provider in enumerate(shown):
        found = {i: g[provider] for i, g in enumerate(groups.values()) if provider in g}
        axis.bar(
            [place + (offset - len(shown) / 2 + 0.5) * width for place in found],
            [each.median_ms for each in found.values()],
            width,
            label=provider,
            color=COLOURS[provider],
        )
    axis.set_yscale("log")
    axis.set_ylabel("median time, ms (log)")
    axis.set_title(title)
    labels = [label.removeprefix("score-").replace(" noise", "") for label in groups]
    labels = [label.replace(" ", "\n") for label in labels]
    axis.set_xticks(range(len(groups)), labels, fontsize=7)
    axis.legend(ncols=len(shown), fontsize=8)
    axis.grid(axis="y", alpha=0.3)


def _curves(axis: Axes, rows: Sequence[Row]) -> None:
    for kind, style in (("scale-elements", "o-"), ("scale-tensors", "s--")):
        for provider in (names.OURS, names.FLOOR):
            found = [r for r in rows if r.workload.startswith(kind) and r.provider == provider]
            found.sort(key=lambda each: each.elements)
            what = "one tensor" if kind == "scale-elements" else "tensors of 4 Ki"
            axis.plot(
                [each.elements for each in found],
                [each.median_ms for each in found],
                style,
                label=f"{provider}, {what}",
                color=COLOURS[provider],
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("elements")
    axis.set_ylabel("median time of a step, ms")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
