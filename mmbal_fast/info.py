"""What is installed, what it can use, and whether every operation computes right here.

Example:
    >>> from mmbal_fast.info import collect
    >>> info = collect()
    >>> info.ok, len({check.operation for check in info.checks})
    (True, 12)
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from mmbal_fast import _backend, functional, reference
from mmbal_fast._version import __version__

TOLERANCE = 1e-5
"""Largest passing deviation, relative to ``max(1, |value|)``. Correct kernels stay below 1e-6."""


@dataclass(frozen=True)
class Check:
    """One operation on one device, compared with the reference on the CPU."""

    operation: str
    device: str
    backend: str  # "native" or "reference"
    deviation: float | None  # None: the reference itself ran on the CPU, or `failure` says why
    failure: str | None


@dataclass(frozen=True)
class Info:
    """Everything ``mmbal-fast info`` prints; None is what there is not."""

    version: str
    python: str
    platform: str
    torch: str
    torch_cuda: str | None
    exchange_api: bool
    threads: int
    openmp: tuple[str, ...]
    native: str | None
    native_why_not: str | None
    compiler: str | None
    cpu_isa: str | None
    cpu_isas: tuple[str, ...]
    cuda: str | None
    cuda_why_not: str | None
    cuda_architectures: tuple[str, ...]
    cuda_devices: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.failure is None for check in self.checks)


def collect() -> Info:
    """Looks at this process and machine, and runs every operation on every device."""
    native = _backend.native
    build = {} if native is None else native.build_info()
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return Info(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        torch=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        exchange_api=hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
        threads=torch.get_num_threads(),
        openmp=_openmp(),
        native=None if native is None else build.get("version", "unknown version"),
        native_why_not=_backend.why_not,
        compiler=build.get("compiler"),
        cpu_isa=None if native is None else native.cpu_isa(),
        cpu_isas=() if native is None else tuple(native.cpu_isas()),
        cuda=build.get("cuda_version"),
        cuda_why_not=_why_no_cuda(native),
        cuda_architectures=tuple(build.get("cuda_architectures", "").split()),
        cuda_devices=tuple(torch.cuda.get_device_name(device) for device in devices[1:]),
        checks=tuple(check(name, device) for device in devices for name in OPERATIONS),
    )


def _why_no_cuda(native: ModuleType | None) -> str | None:
    if native is None:
        return "there is no native module"
    if native.cuda_device_count() == 0:
        return str(native.cuda_unavailable())
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _openmp() -> tuple[str, ...]:
    """Files of OpenMP runtimes in this process. More than one means two competing thread pools."""
    maps = Path("/proc/self/maps")
    text = maps.read_text() if maps.exists() else ""
    return tuple(sorted(set(re.findall(r"(/\S.*/lib[gi]?omp[^/\s]*)$", text, re.MULTILINE))))


# ---- The self-check ------------------------------------------------------------------------------

Operation = Callable[[ModuleType, torch.device], Sequence[Tensor]]


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _gradients(device: torch.device) -> list[Tensor]:
    """Below a vector, a convolution in channels_last, and more than a chunk; far from mean 0."""
    last = _numbers(8, 5, 3, 3, seed=1).to(memory_format=torch.channels_last)
    return [each.to(device) for each in (_numbers(3) + 2, last, _numbers(20001, seed=2) - 1)]


def _scores(operations: ModuleType, device: torch.device) -> Sequence[Tensor]:
    logits = [_numbers(37, 10, seed=seed).to(device) for seed in range(3)]
    return [operations.contribution_scores(logits, (torch.arange(37) % 10).to(device))]


def _ratios(operations: ModuleType, device: torch.device) -> Sequence[Tensor]:
    return [operations.discrepancy_ratios(torch.tensor([3.0, 5.0, 0.5], device=device))]


def _coefficients(operations: ModuleType, device: torch.device) -> Sequence[Tensor]:
    ratios = torch.tensor([0.5, 1.5, float("nan"), 4.0], device=device)
    return [
        operations.modulation_coefficients(ratios, 0.8, rule=rule)
        for rule in ("cvpr2022", "cvpr2022_excess", "tpami2024")
    ]


def _moments(operations: ModuleType, device: torch.device) -> Sequence[Tensor]:
    return [operations.gradient_moments(_gradients(device))]


def _modulate(operations: ModuleType, device: torch.device) -> Sequence[Tensor]:
    gradients = _gradients(device)
    coefficients = torch.tensor([0.25, 0.75], device=device)
    operations.modulate_(gradients, coefficients, [0, 1, 0], seed=11, step=5)
    return gradients


def _noise(operations: ModuleType, device: torch.device) -> Sequence[Tensor]:
    empty = torch.empty(20001, device=device)
    return [operations.noise_like(empty, seed=11, step=5, tensor_id=3, offset=6)]


def _norms(operations: ModuleType, device: torch.device) -> Sequence[Tensor]:
    return [operations.squared_norms(_gradients(device), [1, 0, 1])]


def _dots(operations: ModuleType, device: torch.device) -> Sequence[Tensor]:
    gradients = _gradients(device)
    return [operations.gradient_dots(gradients, [each + 1 for each in gradients])]


def _pareto(operations: ModuleType, device: torch.device) -> Sequence[Tensor]:
    gradients = _gradients(device)
    own = [1 - each for each in gradients]
    return [operations.pareto_(gradients, own, [0, 1, 0], 2, gamma=1.5), *gradients]


def _pull(operations: ModuleType, device: torch.device) -> Sequence[Tensor]:
    gradients = _gradients(device)
    parameters, anchors = [each + 1 for each in gradients], [each - 1 for each in gradients]
    factors = torch.tensor([0.25, 0.0], device=device)
    return [operations.pull_(gradients, parameters, anchors, factors, [0, 1, 0]), *gradients]


def _dropped(operations: ModuleType, device: torch.device) -> Sequence[Tensor]:
    features = [_numbers(64, size, seed=size).to(device) for size in (5, 16)]
    ratios = torch.tensor([2.0, 0.5], device=device)
    # The reference gives its mask, too.
    results, weight, q = operations.drop_features(features, ratios, base=0.5, strength=0.5)[:3]
    return [*results, weight, q]


def _cross_entropy(operations: ModuleType, device: torch.device) -> Sequence[Tensor]:
    logits = [_numbers(37, 10, seed=seed).to(device).requires_grad_() for seed in range(3)]
    target = (torch.arange(37) % 10).to(device)
    loss, losses = operations.blended_cross_entropy(logits, target, [0.5, 0.2, 0.3])
    return [loss.detach(), losses.detach(), *torch.autograd.grad(loss, logits)]


OPERATIONS: dict[str, Operation] = {
    "contribution_scores": _scores,
    "discrepancy_ratios": _ratios,
    "modulation_coefficients": _coefficients,
    "gradient_moments": _moments,
    "modulate_": _modulate,
    "noise_like": _noise,
    "squared_norms": _norms,
    "blended_cross_entropy": _cross_entropy,
    "gradient_dots": _dots,
    "pareto_": _pareto,
    "pull_": _pull,
    "drop_features": _dropped,
}
"""A small run of each operation that has a kernel.

From a module that holds the operation and a device to what it returns.
"""


def check(operation: str, device: torch.device) -> Check:
    """Runs an operation on a device and compares with the reference on the CPU.

    Args:
        operation: a name in `OPERATIONS`.
        device: where to run it.

    Returns:
        The largest deviation, relative to ``max(1, |value|)``, or what went wrong.
    """
    native = _backend.runs(device) is not None
    deviation = failure = None
    try:
        got = OPERATIONS[operation](functional, device)
        if native or device.type != "cpu":
            expected = OPERATIONS[operation](reference, torch.device("cpu"))
            deviation = _deviation(got, expected)
            if not deviation <= TOLERANCE:  # also where it is NaN
                failure = f"deviates by {deviation:.1e} from the reference"
    except Exception as error:  # shown for what it is, so that the other checks still run
        failure = f"{type(error).__name__}: {error}"
    return Check(operation, str(device), "native" if native else "reference", deviation, failure)


def _deviation(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    x, y = (torch.cat([each.flatten().cpu().double() for each in all_]) for all_ in (got, expected))
    return ((x - y).abs() / y.abs().clamp(min=1.0)).max().item()  # NaN if there is one


# ---- Output --------------------------------------------------------------------------------------


def render(info: Info) -> str:
    """The text that ``mmbal-fast info`` prints."""
    no_kernels = f"none: {info.cuda_why_not}"
    facts = {
        "mmbal_fast": info.version,
        "python": f"{info.python}, {info.platform}",
        "torch": f"{info.torch}, {_or(info.torch_cuda, 'without CUDA', 'CUDA {}')}",
        "exchange API": "present"
        if info.exchange_api
        else "absent: pip install torch-c-dlpack-ext",
        "threads": f"{info.threads} (torch.set_num_threads), OpenMP: "
        + (" and ".join(info.openmp) or "unknown"),
        "native module": _or(info.native, f"none: {info.native_why_not}"),
        "  compiler": _or(info.compiler, "-"),
        "  instructions": f"{info.cpu_isa}, of {', '.join(info.cpu_isas)} (MMBAL_CPU_ISA)"
        if info.cpu_isa
        else "-",
        "CUDA kernels": no_kernels if info.cuda_why_not else "present",
        "  built with": _or(info.cuda, "-", "CUDA {}"),
        "  architectures": ", ".join(info.cuda_architectures) or "-",
        "  devices": ", ".join(info.cuda_devices) or "-",
    }
    lines = [f"{name:17}{text}" for name, text in facts.items()]
    if len(info.openmp) > 1:
        lines.append("warning: two OpenMP runtimes compete for the cores")
    lines += ["", "self-check against the reference"]
    lines += [
        f"  {check.device:8}{check.operation:25}{check.backend:11}{_verdict(check)}"
        for check in info.checks
    ]
    return "\n".join(lines)


def _or(value: str | None, otherwise: str, form: str = "{}") -> str:
    return otherwise if value is None else form.format(value)


def _verdict(check: Check) -> str:
    if check.failure is not None:
        return f"FAILED: {check.failure.splitlines()[0]}"
    if check.deviation is None:
        return "runs (nothing to compare with)"
    return f"ok (deviation {check.deviation:.1e})"


def main(argv: Sequence[str] = ()) -> int:
    """``mmbal-fast info``.

    Args:
        argv: its arguments.

    Returns:
        0, or 1 if a self-check failed.
    """
    parser = argparse.ArgumentParser(
        prog="mmbal-fast info", description="What is installed and whether it computes right."
    )
    parser.add_argument("--json", action="store_true", help="print for programs")
    options = parser.parse_args(argv)
    info = collect()
    if options.json:
        print(json.dumps({**asdict(info), "ok": info.ok}, indent=2))
    else:
        print(render(info))
    return 0 if info.ok else 1
