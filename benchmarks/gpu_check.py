"""Everything that needs a GPU, in one command: ``make gpu-check``.

Builds for the GPU that is there, runs the tests on it, asks what only a GPU can answer (graphs,
threads, launches, host reads), times the step in both of its forms, runs compute-sanitizer over a
small set and the bench, and writes benchmarks/results/<gpu>-*.json after each stage. Uses the
python3 that runs it, which must hold torch, cmake, ninja, pybind11 and the test packages; needs no
network. Done within ten minutes: what there is no time for is named.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.conftest import Backend

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 570


def main() -> int:
    """Runs all stages, or in a process of its own one part of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="for the stages' own processes")
    parser.add_argument("--backend", default="cuda", help="of that part; cuda-emulated has no GPU")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.part is None:
        return check_all()
    from tests.conftest import make_backend

    with make_backend(arguments.backend).running() as backend:
        print(json.dumps(PARTS[arguments.part](backend)))
    return 0


def check_all() -> int:
    """Every stage on the GPU; 1 if one of them failed."""
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
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}-check.json"
    outcome: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    ends = time.monotonic() + SECONDS
    for stage, command in stages(shutil.which("compute-sanitizer")).items():
        outcome[stage] = run(stage, command, environment, ends - time.monotonic())
        path.write_text(json.dumps(outcome, indent=2) + "\n")
        if stage == "build" and outcome[stage] != "ok":
            break
    print(json.dumps(outcome, indent=2))
    print(f"wrote {path.relative_to(ROOT)}")
    return int(any(not passed(outcome.get(stage, "not run")) for stage in stages("")))


def stages(sanitizer: str | None) -> dict[str, list[str]]:
    """Their commands, what matters most first; without a sanitizer empty ones for its tools."""
    python, this = sys.executable, str(Path(__file__).resolve())
    commands = {
        "build": [python, "setup.py", "build_ext", "--inplace"],
        "tests": [python, "-m", "pytest", "-q", "-k", "cuda and not emulated"]
        + [f"tests/{suite}" for suite in ("functional", "methods", "nn")],
    }
    commands |= {part: [python, this, "--part", part] for part in ANSWERS}
    for tool in ("memcheck", "racecheck"):
        watch = [sanitizer, "--tool", tool, "--error-exitcode", "9"] if sanitizer else []
        commands[tool] = [*watch, python, this, "--part", "small_set"] if watch else []
    bench = [python, "-m", "mmbal_fast", "bench", "--device", "cuda", "--out", str(RESULTS)]
    return commands | {"bench": [*bench, "--no-compile"]}


def run(stage: str, command: list[str], environment: dict[str, str], seconds: float) -> Any:
    """Runs one stage: "ok", what its part answers, or what went wrong. What it prints goes on."""
    if not command:
        return "not run: compute-sanitizer is not on PATH"
    if seconds <= 0:
        return "not run: no time left"
    print(f"== {stage}: {' '.join(command)}", flush=True)
    began = time.monotonic()
    answers = subprocess.PIPE if stage in ANSWERS else None
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=seconds, stdout=answers, text=True
        )
    except subprocess.TimeoutExpired:
        return f"not finished after {seconds:.0f} s"
    took = time.monotonic() - began
    print(f"== {stage}: exit code {done.returncode} after {took:.0f} s", flush=True)
    if done.returncode != 0:
        return f"exit code {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1]) if answers else "ok"


def passed(result: Any) -> bool:
    """Whether a stage has nothing to mend; timings and counts are for the reader."""
    if isinstance(result, dict):
        return all(value is not False for value in result.values())
    return bool(result == "ok")


def small_set(backend: Backend) -> str:
    """Every operation and type once, on tensors around a chunk's edges, at odd alignments.

    What compute-sanitizer watches, and on the emulated module the race detector.
    """
    import torch

    from mmbal_fast import _backend, functional
    from mmbal_fast.functional import _accumulate_speeds, _derive, _modulate, _observe

    on = backend.device
    numbers = torch.tensor([0.3, 1.0], device=on)
    status = torch.zeros(1, dtype=torch.int32, device=on)
    counter = torch.zeros(1, dtype=torch.int64, device=on)
    # An emulated GPU takes minutes, and its threads meet at the same places whatever the type.
    emulated = on.type != "cuda"
    short = () if emulated else (torch.float16, torch.bfloat16)
    for dtype in (torch.float32, torch.float64, *short):
        base = torch.randn(3 * 4096 + 64, device=on).to(dtype)
        grads = [base[1:5].clone(), base[7:4104].clone(), base[3:].clone()[1:]]
        for one in (False, True):
            with _backend.using(backend.native, in_one_launch=one):
                functional.modulate_(grads, numbers, [0, 1, 0], offsets=[0, 5, 2**34])
                _modulate.update_(
                    grads,
                    numbers,
                    [0, 1, 0],
                    step=counter,
                    status=status,
                    advance=True,
                    inverse_scale=torch.tensor(0.5, device=on),
                    found_inf=torch.zeros((), device=on),
                )
        functional.modulate_(grads, numbers, [0, 1, 0], noise=0.0)
        moments = functional.gradient_moments(grads)
        functional.modulate_(grads, numbers, [0, 1, 0], moments=moments)
        functional.squared_norms(grads, [0, 1, 0])
        functional.gradient_dots(grads, grads)
        functional.noise_like(base, seed=1, step=2)
        functional.pareto_(grads, [each + 1 for each in grads], [0, 1, 0], 2)
        functional.pull_(
            grads, [each + 1 for each in grads], [each - 1 for each in grads], numbers, [0, 1, 0]
        )
        rows = [base[:40].view(4, 10).clone().requires_grad_() for _ in range(2)]
        scaled, _, _ = functional.drop_features(rows, numbers + 1, base=0.5, strength=0.5)
        torch.autograd.grad(scaled[0].sum() + scaled[1].sum(), rows)
        for classes in (6, 1500) if emulated else (6, 310, 5000):
            logits = [torch.randn(9, classes, device=on).to(dtype) for _ in range(3)]
            logits = [each.requires_grad_() for each in logits]
            target = torch.arange(9, device=on) % classes
            soft = logits[0].detach().softmax(1)
            for labels in (target, soft):
                scores = functional.contribution_scores(logits, labels)
            ratios = functional.discrepancy_ratios(scores)
            functional.modulation_coefficients(ratios, 0.3)
            weights = [0.5, 0.25, 0.25]
            loss, _ = functional.blended_cross_entropy(logits, target, weights, label_smoothing=0.1)
            torch.autograd.grad(loss, logits)
    state, past = torch.zeros(3, 3, device=on), torch.ones(3, device=on)
    totals, steps = torch.zeros(4, device=on), torch.zeros((), dtype=torch.int64, device=on)
    for accumulate in (False, True):
        for rule in ("cvpr2022", "agm"):
            _observe.observe_(
                state, totals, past, steps, logits, target, False, -100, accumulate,
                "probability", 0.3, 1.0, rule, status,
            )  # fmt: skip
            _derive.derive_(state, totals, past, steps, True, 0.3, 1.0, rule)
    _derive.remember_(past, steps, state[0].clone(), totals, None, True)
    _accumulate_speeds.accumulate_speeds_(
        torch.stack([moments, moments]),
        torch.ones(2, 3, dtype=torch.float64, device=on),
        torch.zeros(2, dtype=torch.float64, device=on),
        None,
    )
    if on.type == "cuda":
        torch.cuda.synchronize()
    return "ok"


def threads(backend: Backend) -> dict[str, bool]:
    """Whether two Python threads on one stream get what each of them gets alone."""
    import torch

    from mmbal_fast import _backend, functional

    on = backend.device
    rounds, large = (30, 400_000) if on.type == "cuda" else (4, 20_000)
    numbers = torch.tensor([0.5], device=on)
    sizes = {"small": [large // 10, 9], "large": [large] * 3}
    begins = {
        name: [(1 if name == "small" else 1000) * torch.randn(size, device=on) for size in each]
        for name, each in sizes.items()
    }

    def work(name: str, results: dict[str, list[Any]]) -> None:
        for _ in range(rounds):
            grads = [each.clone() for each in begins[name]]
            functional.modulate_(grads, numbers, [0] * len(grads), seed=len(grads))
            results.setdefault(name, []).append(grads)

    answer = {}
    for one in (False, True):
        with _backend.using(backend.native, in_one_launch=one):
            alone: dict[str, list[Any]] = {}
            together: dict[str, list[Any]] = {}
            for name in sizes:
                work(name, alone)
            workers = [threading.Thread(target=work, args=(name, together)) for name in sizes]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        answer["one launch" if one else "two launches"] = all(
            torch.equal(mine, other)
            for name in sizes
            for first, second in zip(alone[name], together[name], strict=True)
            for mine, other in zip(first, second, strict=True)
        )
    return answer


def graphs(backend: Backend) -> dict[str, bool]:
    """Whether captures on one stream, one of them aborted, replay in any order what eager gives."""
    import torch

    from mmbal_fast import _backend, functional
    from mmbal_fast.bench._providers import captured

    numbers = torch.tensor([0.5], device="cuda")
    begins = [[torch.randn(size, device="cuda")] * 2 for size in (50_000, 70_000)]

    def update(grads: list[Any]) -> None:
        functional.modulate_(grads, numbers, [0] * len(grads))

    answer = {"continues the noise": replay_equals_eager(captured)}
    for one in (False, True):
        with _backend.using(backend.native, in_one_launch=one):
            mine = [[each.clone() for each in grads] for grads in begins]
            right = [[each.clone() for each in grads] for grads in begins]
            for grads in right:
                update(grads)
            update([torch.randn(9, device="cuda")])
            torch.cuda.synchronize()
            try:
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    update(mine[0])
                    torch.cuda.synchronize()  # not allowed here: the capture is lost
            except RuntimeError:
                torch.cuda.synchronize()
            replays = [torch.cuda.CUDAGraph() for _ in mine]
            for graph, grads in zip(replays, mine, strict=True):
                with torch.cuda.graph(graph):
                    update(grads)
            for order in ([1], [0, 1], [1, 0], [1, 1, 0]):
                equal = True
                for which in order:
                    for grad, begin in zip(mine[which], begins[which], strict=True):
                        grad.copy_(begin)
                    replays[which].replay()
                    torch.cuda.synchronize()
                    equal &= all(map(torch.equal, mine[which], right[which]))
                form = "one launch" if one else "two launches"
                answer[f"{form}, replayed {order}"] = equal
    return answer


def step_facts(backend: Backend) -> dict[str, Any]:
    """What the timings do not say: launches, synchronisations, memory."""
    import torch

    from mmbal_fast.bench._providers import OURS, step
    from mmbal_fast.bench._workloads import GRADIENTS

    device = backend.device
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
    }


def launch_forms(backend: Backend) -> dict[str, Any]:
    """Milliseconds of a step whose kernels measure and update in two launches and in one, in turn.

    The slower form can go: csrc/cuda/single_launch.cu or, where moments are measured, the launch in
    csrc/cuda/modulate.cu.
    """
    import torch

    from mmbal_fast import _backend
    from mmbal_fast.bench._measure import Provider, interleaved
    from mmbal_fast.bench._providers import OURS, step
    from mmbal_fast.bench._workloads import GRADIENTS

    where = backend.device
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


ANSWERS = {"graphs": graphs, "threads": threads, "step": step_facts, "launch_forms": launch_forms}
PARTS = {"small_set": small_set, **ANSWERS}

if __name__ == "__main__":
    raise SystemExit(main())
