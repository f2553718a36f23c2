"""Everything that needs a GPU, in one command: ``make gpu-check``.

Builds for the GPU that is there, runs the tests on it, runs compute-sanitizer over a small set,
times the step in both of its forms, and writes benchmarks/results/<gpu>-*.json. Uses the python3
that runs it, which must hold torch, cmake, ninja and pybind11; needs no network. Under 9 minutes on
a server.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    """Runs the stages, or with ``--small-set`` what compute-sanitizer watches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small-set", action="store_true", help="each kernel once, on small data")
    if parser.parse_args().small_set:
        small_set()
        return 0
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: needs a GPU that torch can use (got none)", file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MMBAL_FORCE_CUDA": "1",
        "MMBAL_BUILD_EMULATED": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
    }
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-m", "not packaging and not slow"]
    stages: dict[str, tuple[list[str], int]] = {
        "build": ([python, "setup.py", "build_ext", "--inplace"], 240),
        "tests": (
            [
                *pytest,
                "-k",
                "cuda and not emulated",
                "tests/functional",
                "tests/methods",
                "tests/nn",
            ],
            150,
        ),
    }
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None:
        for tool in ("memcheck", "racecheck"):
            watched = [python, str(Path(__file__).resolve()), "--small-set"]
            stages[tool] = ([sanitizer, "--tool", tool, "--error-exitcode", "9", *watched], 90)
    outcome: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for stage, (command, limit) in stages.items():
        outcome[stage] = run(stage, command, environment, limit)
    if sanitizer is None:
        outcome["memcheck"] = outcome["racecheck"] = "not run: compute-sanitizer is not on PATH"
    if outcome["build"] == "ok":
        sys.path.insert(0, str(ROOT))
        outcome |= {"step": step_facts(), "launch_forms": launch_forms("cuda")}
        bench = [python, "-m", "mmbal_fast", "bench", "--device", "cuda", "--out", str(RESULTS)]
        outcome["bench"] = run("bench", [*bench, "--no-compile"], environment, 180)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}-check.json"
    path.write_text(json.dumps(outcome, indent=2) + "\n")
    print(json.dumps(outcome, indent=2))
    print(f"wrote {path.relative_to(ROOT)}")
    failed = [
        key
        for key in ("build", "tests", "memcheck", "racecheck", "bench")
        if outcome.get(key, "not run") != "ok"
    ]
    return 1 if failed else 0


def run(stage: str, command: list[str], environment: dict[str, str], limit: int) -> str:
    """Runs one stage; what it prints goes through."""
    print(f"== {stage}: {' '.join(command)}", flush=True)
    began = time.perf_counter()
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return f"not finished after {limit} s"
    print(f"== {stage}: exit code {code} after {time.perf_counter() - began:.0f} s", flush=True)
    return "ok" if code == 0 else f"exit code {code}"


def small_set() -> None:
    """Every kernel and every type once, on tensors around a chunk's edges, at odd alignments."""
    import torch

    from mmbal_fast import _backend, functional

    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        base = torch.randn(3 * 4096 + 64, device="cuda").to(dtype)
        grads = [base[1:5], base[7:4104].clone(), base[3:].clone()[1:]]
        functional.gradient_moments(grads)
        coefficients = torch.tensor([0.3, 1.0], device="cuda")
        for noise in (0.0, 1.0):
            functional.modulate_(grads, coefficients, [0, 1, 0], noise=noise, offsets=[0, 5, 2**34])
        with _backend.using(_backend.native, in_one_launch=True):
            functional.modulate_(grads, coefficients, [0, 1, 0], offsets=[0, 5, 2**34])
        functional.noise_like(base, seed=1, step=2)
        for classes in (6, 310, 5000):
            logits = [torch.randn(9, classes, device="cuda").to(dtype) for _ in range(3)]
            target = torch.arange(9, device="cuda") % classes
            scores = functional.contribution_scores(logits, target)
            functional.contribution_scores(logits, logits[0].softmax(1))
            ratios = functional.discrepancy_ratios(scores)
            functional.modulation_coefficients(ratios, 0.3)
    torch.cuda.synchronize()


def step_facts() -> dict[str, Any]:
    """What the timings do not say: launches, synchronisations, replayed graphs."""
    import torch

    from mmbal_fast.bench._providers import OURS, captured, step
    from mmbal_fast.bench._workloads import GRADIENTS

    device = torch.device("cuda")
    providers = step(GRADIENTS["av-resnet18"], torch.float32, device, True, False)
    ours = next(each for each in providers if each.name == OURS)
    ours.restore()
    ours.run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ours.run()
        torch.cuda.synchronize()
    launches = sum(
        event.count for event in profile.key_averages() if event.device_type.name == "CUDA"
    )
    before = torch.cuda.memory_stats()["num_alloc_retries"], torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            ours.run()
        synchronises = "no"
    except RuntimeError as error:
        synchronises = str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    grew = torch.cuda.memory_reserved() - before[1]
    return {
        "launches": launches,
        "synchronises": synchronises,
        "reserved_bytes_grown": grew,
        "graph_replay_equals_eager": replay_equals_eager(captured),
    }


def launch_forms(device: str) -> dict[str, Any]:
    """Milliseconds of a step whose kernels measure and update in two launches and in one, in turn.

    The slower form can go: csrc/cuda/single_launch.cu or, where moments are measured, the launch in
    csrc/cuda/modulate.cu.
    """
    import torch

    from mmbal_fast import _backend
    from mmbal_fast.bench._measure import Provider, interleaved
    from mmbal_fast.bench._providers import OURS, step
    from mmbal_fast.bench._workloads import GRADIENTS

    where = torch.device(device)
    outcome: dict[str, Any] = {}
    for name in ("av-resnet18", "tiny", "many"):
        providers = step(GRADIENTS[name], torch.float32, where, True, False)
        ours = next(each for each in providers if each.name == OURS)

        def run(in_one_launch: bool, ours: Provider = ours) -> None:
            _backend.single_launch = in_one_launch
            ours.run()

        forms = [
            Provider("two launches", partial(run, False), ours.restore),
            Provider("one launch", partial(run, True), ours.restore),
        ]
        try:
            timings = interleaved(forms, where, seconds=2.0)
        finally:
            _backend.single_launch = False
        outcome[name] = {
            form: {f"p{q}": round(1e3 * timing.quantile(q / 100), 5) for q in (20, 50, 80)}
            for form, timing in timings.items()
        }
        outcome[name]["faster"] = min(timings, key=lambda form: timings[form].median)
    return outcome


def replay_equals_eager(captured: Callable[[Callable[[], object]], Callable[[], None]]) -> bool:
    """Whether replays continue the noise where eager steps would, bit for bit."""
    import torch

    from mmbal_fast import OGMGE

    def train(graph: bool) -> list[Any]:
        generator = torch.Generator(device="cuda").manual_seed(0)
        parameters = [torch.nn.Parameter(torch.empty(257, 33, device="cuda")) for _ in range(4)]
        grads = [torch.randn(p.shape, device="cuda", generator=generator) for p in parameters]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        balancer = OGMGE({"a": parameters[:2], "b": parameters[2:]}, alpha=0.5)
        logits = {key: torch.randn(8, 5, device="cuda", generator=generator) for key in ("a", "b")}
        target = torch.arange(8, device="cuda") % 5
        replay = captured(lambda: balancer.step(logits, target)) if graph else None
        seen = []
        for step in range(5):
            for parameter, grad in zip(parameters, grads, strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(grad)
            if replay is not None and step >= 3:  # capture warms up with three steps
                replay()
            elif replay is None:
                balancer.step(logits, target)
            seen.append([p.grad.clone() for p in parameters if p.grad is not None])
        return seen[3:]

    eager, replayed = train(False), train(True)
    return all(
        torch.equal(a, b)
        for first, second in zip(eager, replayed, strict=True)
        for a, b in zip(first, second, strict=True)
    )


if __name__ == "__main__":
    raise SystemExit(main())
