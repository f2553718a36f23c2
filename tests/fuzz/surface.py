"""Every public operation on arguments that a seed draws, good and bad: ``make fuzz``.

A case is made anew, of the same seed, for the reference, the CPU's kernels and the emulated CUDA
kernels. They must agree, or all refuse in the library's own words with nothing written; what an
operation does not say it writes must stay as it was. Cases run in a process of their own, so that a
crash names its seed. ``python tests/fuzz/surface.py --first SEED --cases 1`` runs one again.
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import random
import re
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("reference", "cpu", "cuda-emulated")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
SUMS = {"gradient_moments", "gradient_dots", "pareto_", "squared_norms"}
HANGS = 60
"""Seconds after which a case does not end."""
MEMORY = 2**34
SIZES = (0, 1, 2, 3, 5, 17, 64, 4095, 4097)


@dataclass
class Case:
    """A call, and which of its tensors it may write."""

    operation: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    written: list[Tensor] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        found: list[Tensor] = []

        def visit(value: object) -> None:
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, (list, tuple)):
                for each in value:
                    visit(each)

        visit([self.arguments, list(self.named.values())])
        return found


class Draw:
    """Arguments that follow from a seed; ``odd`` is how likely one is not what it should be."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.odd = self.random.choice([0.0, 0.0, 0.05, 0.2])

    def of(self, good: Sequence[Any], bad: Sequence[Any] = ()) -> Any:
        """A good value, seldom a bad one."""
        if bad and self.random.random() < self.odd:
            return self.random.choice(bad)
        return self.random.choice(good)

    def values(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Numbers, seldom with some that are not."""
        scale = self.random.choice([1.0, 1.0, 1e-3, 100.0])
        x = scale * torch.randn(list(shape), generator=self.generator, dtype=torch.float64)
        if x.numel() and self.random.random() < self.odd / 2:
            x.view(-1)[self.random.randrange(x.numel())] = self.random.choice(
                [math.nan, math.inf, -math.inf, 1e30, 1e160, 1e308]
            )
        return x.to(dtype)

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """A tensor of any layout."""
        n = self.random.choice(SIZES)
        layout = self.random.choice(
            ["plain", "view", "transposed", "channels_last", "gaps", "scalar", "negated"]
        )
        if layout == "view":
            shift = self.random.randrange(17)
            return self.values([n + shift], dtype)[shift:]
        if layout == "transposed":
            return self.values([1 + n // 7, 7], dtype).t()
        if layout == "channels_last":
            x = self.values([1 + n // 24, 3, 2, 4], dtype)
            return x.to(memory_format=torch.channels_last)
        if layout == "gaps":
            return self.values([n, 2], dtype)[:, 0]
        if layout == "scalar":
            return self.values([], dtype)
        if layout == "negated":
            pair = torch.complex(self.values([n], torch.float32), self.values([n], torch.float32))
            return pair.conj().imag.to(dtype)
        return self.values([n], dtype)

    def odd_tensor(self) -> Any:
        """What no operation takes for a gradient."""
        make: list[Callable[[], Any]] = [
            lambda: self.values([4], torch.float64).to(self.random.choice(OTHERS)),
            lambda: self.values([3, 3], torch.float32).to_sparse(),
            lambda: torch.empty(5, device="meta"),
            lambda: self.values([1, 4], torch.float32).expand(3, 4),
            lambda: self.values([9], torch.float32).unfold(0, 4, 2),
            lambda: torch._efficientzerotensor((4,)),
            lambda: self.values([4], torch.float32)._neg_view(),
            lambda: 0.5,
            lambda: "gradient",
            lambda: [1.0, 2.0],
        ]
        return self.random.choice(make)()

    def gradients(self) -> Any:
        """Several, with None, repetitions and memory in common."""
        grads: list[Any] = []
        for _ in range(self.random.choice([0, 1, 2, 3, 3, 5])):
            chance = self.random.random()
            plain = [x for x in grads if isinstance(x, Tensor) and x.dim() == 1 and x.numel() > 4]
            if chance < self.odd:
                grads.append(self.odd_tensor())
            elif chance < 0.1:
                grads.append(None)
            elif chance < 0.2 and grads:
                grads.append(self.random.choice(grads))
            elif chance < 0.2 + self.odd and plain:
                grads.append(self.random.choice(plain)[2:])
            else:
                grads.append(self.tensor(self.random.choice(FLOATS)))
        if len(grads) > 1 and self.random.random() < self.odd:
            base = self.values([64], torch.float32)
            grads[:2] = [base[:40], base[30:]]
        chosen: Any = self.random.choice([grads, grads, tuple(grads)])
        return chosen

    def number(self, good: Sequence[float]) -> Any:
        """A setting."""
        chosen = self.of(good, [-1.0, math.nan, math.inf, -math.inf, "1", None, 10**400, [1.0], 1j])
        if isinstance(chosen, float) and self.random.random() < 0.2:
            return torch.tensor(chosen, dtype=self.random.choice([torch.float32, torch.float64]))
        return chosen

    def integer(self, good: Sequence[int]) -> Any:
        """A seed, step, id or offset."""
        return self.of(good, [-1, 2**32 + 7, 2**63, 2**64, -(2**63) - 1, 1.5, "1", None, True])

    def per(self, count: int, good: Sequence[int]) -> Any:
        """One integer for each of some tensors."""
        each: list[Any] = [self.integer(good) for _ in range(count)]
        return self.of([each, tuple(each)], [each[1:], [*each, 0], "12", 3, None, iter(each)])

    def logits(self, least: int = 1) -> tuple[list[Any], Tensor]:
        """A batch of several modalities, and its labels."""
        batch, classes = self.random.choice([0, 1, 4, 9]), self.random.choice([1, 2, 6, 40])
        classes = max(classes, 2) if self.random.random() > self.odd else classes
        more = self.random.choice([[], [], [3]])
        one = self.random.choice([True, True, False])
        dtype = self.random.choice(FLOATS)
        logits: list[Any] = []
        for _ in range(max(least, self.random.choice([1, 2, 3])) - self.of([0], [1])):
            shape = [batch, classes, *more]
            if self.random.random() < self.odd / 2:
                shape[self.random.randrange(len(shape))] += 1
            kind = dtype if one else self.random.choice(FLOATS)
            x = self.values(shape, kind)
            if self.random.random() < 0.2:
                x = self.values([2 * batch, *shape[1:]], kind)[::2]
            logits.append(self.of([x, x, x.clone().requires_grad_()], [self.odd_tensor()]))
        labels = [batch + self.of([0], [1]), *more]
        target = torch.randint(0, classes, labels, generator=self.generator)
        if target.numel() and self.random.random() < 0.2:
            target.view(-1)[0] = self.of([-100], [classes, -1, -(2**63)])
        soft = self.values([batch, classes, *more], self.random.choice(FLOATS)).abs()
        chosen = self.of(
            [target, target, target.int(), soft],
            [target.bool(), soft.to(torch.complex64), -soft, [0, 1]],
        )
        return logits, chosen

    def case(self) -> Case:
        """A call of any operation."""
        make = [getattr(self, name) for name in sorted(OPERATIONS)]
        return self.random.choice([*make, self.modulate_, self.modulate_])()  # type: ignore[no-any-return]

    def modulate_(self) -> Case:
        grads = self.gradients()
        modalities = self.random.choice([1, 2, 3])
        k = self.values([modalities], torch.float32).abs()
        named: dict[str, Any] = {}
        if self.random.random() < 0.7:
            named["noise"] = self.number([0.0, 1.0, 2.5])
        if self.random.random() < 0.5:
            named["seed"] = self.integer([0, 7, 2**63 - 1, -3])
        if self.random.random() < 0.5:
            counters = [torch.tensor(5), torch.tensor([2**40])]
            bad = [torch.tensor([1.0]), torch.tensor([1, 2]), torch.empty(0, dtype=torch.int64)]
            named["step"] = self.of([self.integer([0, 2**33]), *counters], bad)
        if self.random.random() < 0.4:
            named["tensor_ids"] = self.per(len(grads), [0, 1, 2**32 - 1, 99])
        if self.random.random() < 0.4:
            named["offsets"] = self.per(len(grads), [0, 3, 4096, 2**34])
        if self.random.random() < 0.2:
            count = len(grads) + self.of([0], [1, -1])
            rows = self.values([max(count, 0), 3], torch.float64).abs() + 1
            named["moments"] = self.of([rows], [rows.float(), rows.t(), rows[:, 0], "m"])
        if self.random.random() < 0.2:
            named["eps"] = self.number([0.0, 1e-8])
        status = torch.zeros(1, dtype=torch.int32)
        if self.random.random() < 0.2:
            named["status"] = self.of([status], [status.long(), torch.empty(0), 0, status.float()])
        if self.random.random() < 0.2:
            named["error_if_nonfinite"] = self.random.choice([True, False])
        k = self.of([k], [k.double(), k[:0], k.tolist(), None, torch.stack([k, k], 1)])
        which = self.per(len(grads), range(modalities))
        case = Case("modulate_", (grads, k, which), named)
        case.written = [x for x in grads if isinstance(x, Tensor)]
        case.written += [x for x in (named.get("status"),) if isinstance(x, Tensor)]
        return case

    def gradient_moments(self) -> Case:
        return Case("gradient_moments", (self.of([self.gradients()], [None, 3]),), {})

    def gradient_dots(self) -> Case:
        first = self.gradients()
        second = [x.clone() if isinstance(x, Tensor) and not x.is_sparse else x for x in first]
        return Case("gradient_dots", (first, self.of([second, first], [second[1:], None])), {})

    def twins(self, tensors: Any) -> list[Any]:
        """Quarters of tensors, where rounding decides nothing; seldom of another shape or type."""

        def twin(x: Any) -> Any:
            floats = isinstance(x, Tensor) and x.is_floating_point() and dense([x])
            return x.clone().mul_(0.25) if floats else x

        twins = [twin(x) for x in tensors]
        return self.of([twins], [twins[1:], tensors, None, [*twins, None]])  # type: ignore[no-any-return]

    def pareto_(self) -> Case:
        grads, count = self.gradients(), self.random.choice([1, 2, 3])
        modality = self.per(len(grads), range(count))
        named: dict[str, Any] = {}
        if self.random.random() < 0.5:
            named["gamma"] = self.number([0.0, 1.5])
        if self.random.random() < 0.2:
            first = self.values([len(grads), 1], torch.float64).abs()
            dots = first * torch.tensor([1.0, 0.25, 0.0625], dtype=torch.float64)
            named["dots"] = self.of([dots], [dots.float(), dots[1:], "d"])
        if self.random.random() < 0.2:
            named["scale"] = self.of([torch.tensor(2.0)], [torch.ones(2), 2.0, torch.tensor(2)])
        modalities = self.of([count], [0, -1, 1.5, None])
        case = Case("pareto_", (grads, self.twins(grads), modality, modalities), named)
        case.written = [x for x in grads if isinstance(x, Tensor)]
        return case

    def pull_(self) -> Case:
        grads, count = self.gradients(), self.random.choice([1, 2, 3])
        k = self.values([count], torch.float32).abs()
        k = self.of([k], [k.double(), k[:0], k.tolist(), None, torch.stack([k, k], 1)])
        modality = self.per(len(grads), range(count))
        case = Case("pull_", (grads, self.twins(grads), self.twins(grads), k, modality), {})
        case.written = [x for x in grads if isinstance(x, Tensor)]
        return case

    def drop_features(self) -> Case:
        batch, count = self.random.choice([0, 1, 4, 9]), self.random.choice([1, 2, 3])
        dtypes = [self.random.choice(FLOATS) for _ in range(count)]
        features = [self.values([batch, self.random.choice([1, 5])], dtype) for dtype in dtypes]
        features = [self.of([x], [x[1:], self.odd_tensor()]) for x in features]
        ratios = self.values([count], torch.float32).abs()
        ratios = self.of([ratios], [ratios.double(), ratios[1:], None, ratios.tolist()])
        named: dict[str, Any] = {name: self.number([0.0, 0.5]) for name in ("base", "strength")}
        if self.random.random() < 0.5:
            named["apply"] = self.number([0.0, 1.0])
            named["seed"] = self.integer([0, 7, 2**63 - 1])
            named["stream"] = self.integer([0, 1, 2**32 - 1])
        if self.random.random() < 0.5:
            bad = [torch.tensor([1.0]), torch.tensor([1, 2])]
            named["step"] = self.of([self.integer([0, 2**33]), torch.tensor(5)], bad)
        return Case("drop_features", (self.of([features], [None, [], 3]), ratios), named)

    def squared_norms(self) -> Case:
        tensors = self.gradients()
        named = {"num_groups": self.of([3, 4], [0, -1, 1.5])} if self.random.random() < 0.5 else {}
        groups = [self.of([0, 1, 2], [-1, 1.5, "1", None, 10**4]) for _ in tensors]
        bad = [groups[1:], [*groups, 0], "12", 3, None, iter(groups)]
        return Case("squared_norms", (tensors, self.of([groups, tuple(groups)], bad)), named)

    def noise_like(self) -> Case:
        like = self.tensor(self.random.choice(FLOATS))
        if self.random.random() < self.odd:
            like = self.odd_tensor()
        counters = [torch.tensor(5), torch.tensor([2**40])]
        named = {
            "seed": self.integer([0, 7, 2**63 - 1, -3]),
            "step": self.of([self.integer([0, 2**33]), *counters], [torch.tensor([1.0])]),
        }
        if self.random.random() < 0.5:
            named["tensor_id"] = self.integer([0, 2**32 - 1])
            named["offset"] = self.integer([0, 3, 2**34, 2**62])
        return Case("noise_like", (like,), named)

    def contribution_scores(self) -> Case:
        logits, target = self.logits()
        named = self.labelled()
        if self.random.random() < 0.2:
            named["multi_label"] = self.random.choice([True, False])
        if self.random.random() < 0.3:
            statistics = ["probability", "log_probability", "accuracy"]
            named["statistic"] = self.of(statistics, ["none", None, 3])
        return Case("contribution_scores", (logits, target), named)

    def labelled(self) -> dict[str, Any]:
        """Where the classes are, and which of them does not count."""
        named: dict[str, Any] = {}
        if self.random.random() < 0.3:
            named["ignore_index"] = self.integer([-100, 0])
        if self.random.random() < 0.2:
            named["class_dim"] = self.integer([1, 1, -1])
        return named

    def blended_cross_entropy(self) -> Case:
        logits, target = self.logits(2)
        weights = [self.random.choice([0.0, 0.5, 1.0]) for _ in logits]
        bad = [weights[1:], None, "w", torch.tensor([weights]), 1.0]
        named = self.labelled()
        if self.random.random() < 0.3:
            named["label_smoothing"] = self.number([0.0, 0.1, 1.0])
        chosen = self.of([weights, torch.tensor(weights)], bad)
        return Case("blended_cross_entropy", (logits, target, chosen), named)

    def discrepancy_ratios(self) -> Case:
        scores = self.values([self.random.choice([2, 3, 7])], self.random.choice(FLOATS)).abs()
        bad = [scores[:1], scores[None], scores.long(), scores.tolist(), self.odd_tensor()]
        return Case("discrepancy_ratios", (self.of([scores], bad),), {})

    def modulation_coefficients(self) -> Case:
        ratios = self.values([self.random.choice([2, 3, 7])], self.random.choice(FLOATS)).abs()
        bad = [ratios[None], ratios.long(), ratios.tolist(), self.odd_tensor()]
        rules = ["cvpr2022", "cvpr2022_excess", "tpami2024"]
        named = {"rule": self.of(rules, ["none", None, 3])} if self.random.random() < 0.7 else {}
        alpha = self.number([0.0, 0.3, 2.0])
        return Case("modulation_coefficients", (self.of([ratios], bad), alpha), named)

    def losses(self) -> tuple[Any, ...]:
        """Four checkpoints' losses."""
        count = self.random.choice([2, 3])

        def one() -> Any:
            x = self.values([count], torch.float64).abs()
            return self.of([x, x.float(), x.tolist()], [x[1:], x[None], "l", None, x.long()])

        return one(), one(), one(), one()

    def blending_weights(self) -> Case:
        named = {"floor": self.number([0.1, 1.0])} if self.random.random() < 0.3 else {}
        return Case("blending_weights", self.losses(), named)

    def overfitting_to_generalization_ratio(self) -> Case:
        return Case("overfitting_to_generalization_ratio", self.losses(), {})


OPERATIONS = {
    "blended_cross_entropy",
    "blending_weights",
    "contribution_scores",
    "discrepancy_ratios",
    "drop_features",
    "gradient_dots",
    "gradient_moments",
    "modulate_",
    "modulation_coefficients",
    "noise_like",
    "overfitting_to_generalization_ratio",
    "pareto_",
    "pull_",
    "squared_norms",
}


@dataclass
class Outcome:
    """What a call gave: tensors, or an error, and what it did to its arguments."""

    error: BaseException | None
    results: list[Tensor]
    changed: list[str]


def memory(tensor: Tensor) -> bytes | None:
    """All bytes that a tensor can see, gaps included; None where there are none to read."""
    try:
        storage = tensor.untyped_storage()
        if not storage.nbytes() or not storage.data_ptr():
            return b""
        return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()
    except (RuntimeError, NotImplementedError):
        return None


def call(function: Callable[..., Any], case: Case) -> Outcome:
    """Runs a case."""
    before = [memory(each) for each in case.tensors()]
    error, results = None, []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = function(*case.arguments, **case.named)
        results = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        results = [x.detach().clone() for x in [*results, *case.written] if x.device.type == "cpu"]
    except Exception as caught:
        error = caught
    allowed = [] if error else [x.untyped_storage().data_ptr() for x in dense(case.written)]
    changed = [
        f"{tensor.dtype} of {list(tensor.shape)}"
        for tensor, old in zip(case.tensors(), before, strict=True)
        if memory(tensor) != old and tensor.untyped_storage().data_ptr() not in allowed
    ]
    return Outcome(error, results, changed)


def dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those with memory of their own."""
    return [x for x in tensors if x.layout == torch.strided and x.device.type == "cpu"]


def own_words(operation: str, error: BaseException) -> bool:
    """Whether an error is the library's: ``op: rule``."""
    kinds = (TypeError, ValueError, RuntimeError, IndexError)
    return isinstance(error, kinds) and str(error).startswith(f"{operation}: ")


def same_value(one: Tensor, other: Tensor, sums: bool = False) -> bool:
    """Whether two results agree to the rounding of their type.

    Of sums that are not finite it is not said which way they are not.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if sums:
        one, other = (each.where(each.isfinite(), math.nan) for each in (one, other))
    unit = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-5}.get(one.dtype, 1e-4)
    a, b = one.double(), other.double()
    finite = a[a.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=unit, atol=unit * largest + 1e-6, equal_nan=True))


def findings(
    case: Callable[[], Case], run: Callable[[str, Case], Outcome], backends: Sequence[str]
) -> list[str]:
    """What is wrong with a case."""
    operation = case().operation
    outcomes = {name: run(name, case()) for name in backends}
    found = []
    for name, outcome in outcomes.items():
        error = outcome.error
        if error is not None and not own_words(operation, error):
            text = re.sub(r"\d+", "N", str(error).split("\n")[0])
            found.append(f"{operation}: words of others on {name}: {type(error).__name__}: {text}")
        if outcome.changed:
            what = "refused" if error else "done"
            found.append(f"{operation}: {what} and written on {name}: {outcome.changed}")
    first = outcomes[backends[0]]
    for name in backends[1:]:
        other = outcomes[name]
        if label_is_told_later(name, first.error):
            continue
        if (first.error is None) != (other.error is None):
            words = [
                f"{type(each.error).__name__}: {each.error}".split("\n")[0]
                if each.error
                else "a result"
                for each in (first, other)
            ]
            text = re.sub(r"\d+", "N", " / ".join(words))
            found.append(f"{operation}: {backends[0]} and {name} part: {text}")
        elif first.error is None and not all(
            same_value(mine, twin, operation in SUMS)
            for mine, twin in zip(first.results, other.results, strict=True)
        ):
            found.append(f"{operation}: {backends[0]} and {name} give other numbers")
    return found


def label_is_told_later(backend: str, error: BaseException | None) -> bool:
    """CUDA kernels set a bit of the status for a label out of range, and go on."""
    return backend.startswith("cuda") and isinstance(error, IndexError)


def run_cases(first: int, cases: int, seconds: float) -> None:
    """Runs cases one after another, and prints what is found, each kind once."""
    from mmbal_fast import functional
    from tests.conftest import make_backend

    assert set(functional.__all__) == OPERATIONS
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    faulthandler.enable()

    def run(name: str, case: Case) -> Outcome:
        with make_backend(name).running():
            return call(getattr(functional, case.operation), case)

    seen, ends = set(), time.monotonic() + seconds
    for seed in range(first, first + cases):
        if time.monotonic() > ends:
            break
        print(f"seed {seed}", flush=True)
        faulthandler.dump_traceback_later(HANGS, exit=True)
        for finding in findings(lambda seed=seed: Draw(seed).case(), run, BACKENDS):  # type: ignore[misc]
            if finding not in seen:
                seen.add(finding)
                print(f"FOUND {seed} {finding}", flush=True)
    faulthandler.cancel_dump_traceback_later()


def main() -> int:
    """Starts processes that run cases until the time is over; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.inside:
        run_cases(arguments.first, arguments.cases, arguments.seconds)
        return 0
    first, ends, found = arguments.first, time.monotonic() + arguments.seconds, set()
    stops = arguments.first + arguments.cases
    while first < stops and (left := ends - time.monotonic()) > 0:
        inside = [sys.executable, __file__, "--inside", "--first", str(first)]
        inside += ["--cases", str(stops - first), "--seconds", str(left)]
        process = subprocess.Popen(inside, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("seed "):
                first = int(line.split()[1]) + 1
            elif line not in found:
                found.add(line)
                print(line, end="", flush=True)
        if process.wait() != 0:
            found.add(f"end {first}")
            print(f"FOUND {first - 1} no end: exit code {process.returncode}", flush=True)
            if first == arguments.first:
                break  # it does not even begin
    print(f"{first - arguments.first} cases from seed {arguments.first}, {len(found)} findings")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
