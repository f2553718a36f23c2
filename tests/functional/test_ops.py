"""The operations as torch.ops.mmbal.*: schemas, shape inference, torch.compile."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from mmbal_fast import functional
from mmbal_fast.functional._derive import derive_
from mmbal_fast.functional._observe import observe_

if TYPE_CHECKING:
    from tests.conftest import Backend

OPS = torch.ops.mmbal


def arguments(device: torch.device) -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """For each operation calls that reach every optional argument."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    logits, labels = [random(4, 3), random(4, 3)], torch.tensor([0, 1, 2, -100], device=device)
    grads = [random(5), random(3, 4), random(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    grads += [random(6, 8)[:, ::2], random(7).double(), random(7).half(), random(7).bfloat16()]
    grads += [random(0)]
    count = len(grads)
    k = torch.tensor([0.5, 1.0], device=device)
    setting = torch.tensor(0.5, dtype=torch.float64)
    numbers: dict[str, Any] = {
        "noise": setting,
        "seed": -3,
        "step": 5,
        "counter": None,
        "tensor_ids": None,
        "offsets": None,
        "moments": None,
        "eps": 1e-8,
        "status": None,
        "advance": False,
        "inverse_scale": None,
        "found_inf": None,
    }
    modality = [i % 2 for i in range(count)]
    every = numbers | {
        "counter": torch.tensor([5], device=device),
        "tensor_ids": [7 * i for i in range(count)],
        "offsets": list(range(count)),
        "moments": torch.tensor([[9.0, 0.0, 4.0]] * count, dtype=torch.float64, device=device),
        "status": torch.zeros(1, dtype=torch.int32, device=device),
        "advance": True,
    }
    state, totals = torch.ones(3, 2, device=device), torch.ones(3, device=device)
    past, steps = torch.zeros(2, device=device), torch.zeros((), dtype=torch.int64, device=device)
    nothing = None, None, None
    status = torch.zeros(1, dtype=torch.int32, device=device)
    rows = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64).to(device)
    return {
        "contribution_scores": [
            ((logits, labels, False, -100, "probability"), {}),
            ((logits, logits[0].sigmoid(), True, -100, "accuracy"), {}),
            (
                (
                    [each.clone().requires_grad_() for each in logits],
                    labels,
                    False,
                    -100,
                    "log_probability",
                ),
                {},
            ),
        ],
        "discrepancy_ratios": [((torch.rand(3, generator=generator).to(device),), {})],
        "modulation_coefficients": [
            ((3 * torch.rand(3, generator=generator).to(device), setting, rule), {})
            for rule in ("cvpr2022", "cvpr2022_excess", "tpami2024")
        ],
        "observe_": [
            (
                (
                    state,
                    *memory,
                    logits,
                    labels,
                    False,
                    -100,
                    accumulate,
                    statistic,
                    setting,
                    setting,
                    rule,
                    each,
                ),
                {},
            )
            for accumulate, memory, statistic, rule, each in (
                (False, nothing, "probability", "cvpr2022", None),
                (True, (totals, past, steps), "log_probability", "agm", status),
            )
        ],
        "derive_": [
            ((state, *nothing, False, setting, setting, "tpami2024"), {}),
            ((state, totals, past, steps, True, setting, setting, "metric"), {}),
        ],
        "remember_": [
            ((past, steps, state[0], totals, counts, mean), {})
            for counts, mean in ((None, True), (torch.tensor(True, device=device), False))
        ],
        "gradient_moments": [((grads,), {})],
        "accumulate_speeds_": [
            (
                (
                    rows,
                    torch.ones_like(rows[0, :, :2].T).contiguous(),
                    rows[0, 0, :2].clone(),
                    gate,
                ),
                {},
            )
            for gate in (None, torch.tensor(True, device=device))
        ],
        "modulate_": [((grads, k, modality), numbers), ((grads, k, modality), every)],
        "noise_like": [
            ((grads[0], -3, 5, None, 7, 1), {}),
            ((grads[2], 3, 0, torch.tensor([5], device=device), 2**32 - 1, 2**40), {}),
            ((grads[3], 3, 0, None, 0, 0), {}),
        ],
    }


@pytest.mark.parametrize("name", arguments(torch.device("cpu")))
def test_opcheck(native: Backend, name: str) -> None:
    if native.name == "cuda-emulated":
        pytest.skip("what is checked does not depend on the kernels")
    for args, kwargs in arguments(native.device)[name]:
        opcheck(getattr(OPS, name).default, args, kwargs)


def modulated(grads: list[Tensor], k: Tensor, step: Tensor) -> None:
    functional.modulate_(grads, k, [0, 1, 0], noise=1.0, seed=2**63 + 1, step=step)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # by torch's inductor itself
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_modulate(backend: Backend, compiler: str) -> None:
    if backend.name == "cuda-emulated" or (compiler == "inductor" and backend.name == "reference"):
        pytest.skip("the compiler sees one operation, whatever runs it")
    grads = [torch.randn(5), torch.randn(300, 40), torch.randn(6, 8)[:, ::2]]
    grads = [grad.to(backend.device) for grad in grads]
    twins = [grad.clone() for grad in grads]
    k, step = torch.tensor([0.5, 1.0]).to(backend.device), torch.tensor([3]).to(backend.device)

    @torch.compile(fullgraph=True, backend=compiler)
    def train_step(grads: list[Tensor], k: Tensor, step: Tensor) -> Tensor:
        doubled = [2 * grad for grad in grads]
        modulated(doubled, k * 1, step)
        modulated(grads, k, step)
        return torch.stack([each.sum() for each in doubled])

    sums = train_step(grads, k, step)
    doubled = [2 * grad for grad in twins]
    modulated(doubled, k, step)
    modulated(twins, k, step)
    for one, other in zip(grads, twins, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(sums, torch.stack([each.sum() for each in doubled]))


def test_compiled_with_missing_gradients(backend: Backend) -> None:
    """None is dropped from the operation's list; the others keep their number and noise."""
    grads = [torch.randn(5, device=backend.device), None, torch.randn(4, device=backend.device)]
    twins = [None if grad is None else grad.clone() for grad in grads]
    k = torch.tensor([0.5, 1.0], device=backend.device)

    def train_step(grads: list[Tensor | None], k: Tensor) -> Tensor:
        moments = functional.gradient_moments(grads)
        functional.modulate_(grads, k, [0, 1, 1], tensor_ids=[4, 5, 6], offsets=[0, 1, 2])
        functional.modulate_(grads, k, [0, 1, 1], moments=moments, noise=0.5)
        return moments

    moments = torch.compile(train_step, fullgraph=True, backend="aot_eager")(grads, k)
    assert torch.equal(moments, train_step(twins, k))
    for one, other in zip(grads, twins, strict=True):
        assert one is other is None or torch.equal(one, other)  # type: ignore[arg-type]


def test_compiled_scores(backend: Backend) -> None:
    logits = [torch.randn(6, 4, device=backend.device, requires_grad=True) for _ in range(3)]
    target = torch.tensor([0, 1, 2, 3, -100, 0], device=backend.device)

    def coefficients(logits: list[Tensor], target: Tensor) -> tuple[Tensor, ...]:
        scores = functional.contribution_scores([2 * each for each in logits], target)
        ratios = functional.discrepancy_ratios(scores)
        return scores, ratios, functional.modulation_coefficients(ratios, 0.3, rule="tpami2024")

    compiled = torch.compile(coefficients, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(logits, target), coefficients(logits, target), strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


def test_compiled_callable_rule(backend: Backend) -> None:
    ratios = torch.tensor([2.0, 0.5], device=backend.device)

    def run(ratios: Tensor) -> Tensor:
        return functional.modulation_coefficients(ratios, 0.0, rule=lambda rho: 1 / rho)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert compiled(ratios).tolist() == run(ratios).tolist() == [0.5, 2.0]


def test_compiled_noise(backend: Backend) -> None:
    like = torch.empty(5, 4, device=backend.device)
    step = torch.tensor([3], device=backend.device)

    def run(like: Tensor, step: Tensor) -> Tensor:
        some = functional.noise_like(like, seed=2**64 - 1, step=step, tensor_id=4, offset=2)
        return some + functional.noise_like(like, seed=7, step=9)

    assert torch.equal(
        torch.compile(run, fullgraph=True, backend="aot_eager")(like, step), run(like, step)
    )


# --- settings that change


def test_settings_that_change_do_not_compile_again(backend: Backend) -> None:
    """Alpha and noise are tensors to the graph; torch raises at the ninth recompilation."""
    grads = [torch.randn(50, device=backend.device), torch.randn(7, device=backend.device)]
    logits = [torch.randn(6, 4, device=backend.device) for _ in range(2)]
    target = torch.tensor([0, 1, 2, 3, -100, 0], device=backend.device)
    compilations = 0

    def step(grads: list[Tensor], alpha: Any, noise: Any) -> tuple[Tensor, ...]:
        state = torch.zeros(3, 2, dtype=torch.float32, device=backend.device)
        nothing = None, None, None
        batch = logits, target, False, -100, False, "probability"
        observe_(state, *nothing, *batch, alpha, 1.0, "cvpr2022", None)
        observed = state[2].clone()
        derive_(state, *nothing, True, alpha, 1.0, "tpami2024")
        k = functional.modulation_coefficients(state[1], alpha)
        functional.modulate_(grads, k, [0, 1], noise=noise, step=3)
        return observed, state[2].clone(), k, *grads

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return graph

    compiled = torch.compile(step, fullgraph=True, backend=counting, dynamic=False)
    for epoch in range(12):
        alpha, noise = 0.1 * epoch, 1.0 / (1 + epoch)
        held = [torch.tensor(value, dtype=torch.float64) for value in (alpha, noise)]
        results = compiled([grad.clone() for grad in grads], *held)
        for one, other in zip(
            results, step([grad.clone() for grad in grads], alpha, noise), strict=True
        ):
            assert torch.equal(one, other)
    assert compilations == 1


@pytest.mark.parametrize("given", [-1.0, float("nan")])
def test_settings_are_checked_when_a_graph_runs(backend: Backend, given: float) -> None:
    ratios, grad = torch.ones(2, device=backend.device), torch.ones(3, device=backend.device)

    @torch.compile(fullgraph=True, backend="eager")
    def coefficients(setting: Tensor) -> Tensor:
        return functional.modulation_coefficients(ratios, setting)

    @torch.compile(fullgraph=True, backend="eager")
    def update(setting: Tensor) -> None:
        functional.modulate_([grad], ratios, [0], noise=setting)

    for run, name in ((coefficients, "alpha"), (update, "noise")):
        with pytest.raises(ValueError, match=rf"_.*: {name} must be a number from 0 on \(got "):
            run(torch.tensor(given, dtype=torch.float64))
    assert grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "given",
    [torch.tensor(1.0), torch.ones(1).double(), torch.tensor(1.0, device="meta").double()],
    ids=["float32", "vector", "meta"],
)
def test_refuses_tensors_that_are_no_setting(given: Tensor) -> None:
    message = (
        r"^modulation_coefficients: alpha must be a number or a float64 tensor \[\] on the CPU"
    )
    with pytest.raises(ValueError, match=message):
        functional.modulation_coefficients(torch.ones(2), given)  # type: ignore[arg-type]


# --- the one declaration


def test_eager_calls_do_not_go_through_the_dispatcher(native: Backend) -> None:
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            assert func.namespace != "mmbal"
            return func(*args, **(kwargs or {}))

    grads = [torch.ones(3, device=native.device)]
    logits = [torch.zeros(2, 3, device=native.device, requires_grad=True) for _ in range(2)]
    target = torch.zeros(2, dtype=torch.int64, device=native.device)
    with Names():
        scores = functional.contribution_scores(logits, target)
        k = functional.modulation_coefficients(functional.discrepancy_ratios(scores), 0.1)
        functional.modulate_(grads, k, [0])
        functional.gradient_moments(grads)
        functional.noise_like(grads[0], seed=0, step=0)
        functional.blended_cross_entropy(logits, target, [0.5, 0.5])[0].backward()
        with pytest.raises(AssertionError):
            torch.ops.mmbal.gradient_moments(grads)


@pytest.mark.parametrize(
    "again",
    [
        """
        for name in [name for name in sys.modules if name.split(".")[0] == "mmbal_fast"]:
            del sys.modules[name]
        """,
        """
        for module in list(sys.modules.values()):
            if module.__name__.startswith("mmbal_fast.functional"):
                importlib.reload(module)
        importlib.reload(mmbal_fast)
        """,
    ],
    ids=["purged", "reloaded"],
)
def test_imported_twice(again: str) -> None:
    """As notebooks do; what runs afterwards is the code that was imported last."""
    program = """
        import importlib, sys, torch
        import mmbal_fast
        first = mmbal_fast.functional.gradient_moments
        AGAIN
        import mmbal_fast
        from mmbal_fast.functional import _gradient_moments
        second = mmbal_fast.functional.gradient_moments
        assert second is not first
        reference = _gradient_moments.moments_of._native
        calls = []
        _gradient_moments.moments_of._native = lambda *each: calls.append(1) or reference(*each)
        grads = [torch.ones(3)]
        rows = torch.compile(second, fullgraph=True, backend="aot_eager")(grads)
        assert rows.tolist() == second(grads).tolist() == [[3, 1, 0]]
        assert len(calls) == 2, calls
    """
    program = textwrap.dedent(program).replace("AGAIN\n", textwrap.dedent(again))
    strict = ["-W", "error", "-W", "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"]
    done = subprocess.run(
        [sys.executable, *strict, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
