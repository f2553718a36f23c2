"""What holds for all operations: torch's defaults do not matter, what torch asks is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmbal_fast import functional, reference
from mmbal_fast.functional._accumulate_speeds import accumulate_speeds_
from mmbal_fast.functional._derive import derive_, remember_
from mmbal_fast.functional._observe import observe_
from tests.defaults import default

if TYPE_CHECKING:
    from tests.conftest import Backend

Call = Callable[[Any], Any]


def calls(device: torch.device) -> dict[str, Call]:
    """Each public operation, called on a module that has it: on inputs made here, now."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    logits, target = [random(4, 3), random(4, 3)], torch.tensor([0, 1, 2, -100], device=device)
    soft, weights = random(4, 3).softmax(1), torch.tensor([0.5, 0.3], dtype=torch.float64)
    grads = [random(5), None, random(6, 8)[:, ::2], random(70).double(), random(9).bfloat16()]
    features = [random(6, 3), random(6, 8)[:, ::2].double()]
    k, ratios = torch.tensor([0.5, 1.0], device=device), torch.tensor([2.0, 0.5], device=device)
    weights = weights.to(device)

    def modulated(ops: Any) -> list[Tensor | None]:
        mine = [None if each is None else each.clone() for each in grads]
        ops.modulate_(mine, k, [0, 1, 0, 1, 0], seed=3, step=torch.tensor([5], device=device))
        return mine

    def combined(ops: Any) -> list[Any]:
        mine, own = ([None if x is None else x + by for x in grads] for by in (0, 1))
        return [ops.pareto_(mine, own, [0, 1, 0, 1, 0], 2, gamma=1.2), mine]

    def pulled(ops: Any) -> list[Any]:
        mine, theta, anchors = ([None if x is None else x + by for x in grads] for by in (0, 1, 2))
        return [ops.pull_(mine, theta, anchors, k, [0, 1, 0, 1, 0]), mine]

    numbers = [1.0, 0.9], [1.0, 0.8], [0.5, 0.4], [0.7, 0.6]
    losses = [torch.tensor(each, dtype=torch.float64, device=device) for each in numbers]
    return {
        "contribution_scores": lambda ops: [
            ops.contribution_scores(logits, target),
            ops.contribution_scores(logits, soft),
            ops.contribution_scores(logits, soft, multi_label=True, statistic="log_probability"),
            ops.contribution_scores(logits, target, statistic="accuracy"),
        ],
        "discrepancy_ratios": lambda ops: ops.discrepancy_ratios(ratios),
        "drop_features": lambda ops: list(
            ops.drop_features(features, ratios, base=0.5, strength=0.5)
        ),
        "modulation_coefficients": lambda ops: ops.modulation_coefficients(ratios, 0.3),
        "gradient_dots": lambda ops: [
            ops.gradient_dots(grads, grads),
            ops.gradient_dots([None], [None]),
        ],
        "gradient_moments": lambda ops: [ops.gradient_moments(grads), ops.gradient_moments([None])],
        "modulate_": modulated,
        "noise_like": lambda ops: [
            ops.noise_like(grads[0], seed=1, step=2),
            ops.noise_like(grads[2], seed=1, step=2),
        ],
        "pareto_": combined,
        "pull_": pulled,
        "squared_norms": lambda ops: ops.squared_norms(grads, [0, 0, 1, 2, 1]),
        "blended_cross_entropy": lambda ops: [
            ops.blended_cross_entropy(logits, target, [0.5, 0.3]),
            ops.blended_cross_entropy(logits, soft, weights, label_smoothing=0.1),
        ],
        "overfitting_to_generalization_ratio": lambda ops: ops.overfitting_to_generalization_ratio(
            *losses
        ),
        "blending_weights": lambda ops: ops.blending_weights(*losses),
    }


def test_lists_every_operation() -> None:
    assert set(calls(torch.device("cpu"))) == set(functional.__all__)


@pytest.mark.parametrize("ops", [functional, reference], ids=["functional", "reference"])
@pytest.mark.parametrize("what", [torch.bfloat16, torch.float16, torch.float64, "meta"], ids=str)
@pytest.mark.parametrize("name", functional.__all__)
def test_defaults_do_not_matter(
    backend: Backend, name: str, what: torch.dtype | str, ops: Any
) -> None:
    if ops is reference and backend.name != "reference":
        pytest.skip("has no backend")
    run = calls(backend.device)[name]
    expected = tree_leaves(run(ops))
    with default(what):
        results = tree_leaves(run(ops))
    for one, other in zip(results, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_numbers_do_not_depend_on_defaults() -> None:
    numbers = [1.0, 0.9], [1.0, 0.8], [0.5, 0.4], [0.7, 0.6]
    expected = functional.blending_weights(*numbers)
    with default("meta"):
        assert torch.equal(functional.blending_weights(*numbers), expected)


# --- in place


def writes(device: torch.device) -> dict[str, tuple[Callable[..., object], list[Tensor]]]:
    """Calls that write, of functions of the tensors that are written."""
    logits = [torch.zeros(2, 3, device=device) for _ in range(2)]
    target = torch.zeros(2, dtype=torch.int64, device=device)
    k, status = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    rows = torch.ones(2, 1, 3, dtype=torch.float64, device=device)
    state, totals = torch.ones(3, 2, device=device), torch.ones(3, device=device)
    past, steps = torch.zeros(2, device=device), torch.zeros((), dtype=torch.int64, device=device)
    member = torch.ones(1, 1, dtype=torch.float64, device=device)
    return {
        "modulate_": (
            lambda x, y, s: functional.modulate_([x, None, y], k, [0, 0, 0], status=s),
            [torch.ones(3, device=device), torch.ones(2, 4, device=device)[:, ::2], status],
        ),
        "pareto_": (
            lambda x, y: functional.pareto_([x, None, y], [x + 1, None, y + 1], [0, 0, 0], 1),
            [torch.ones(3, device=device), torch.ones(2, 4, device=device)[:, ::2]],
        ),
        "pull_": (
            lambda x, y: functional.pull_(
                [x, None, y], [x + 1, x, y + 1], [x - 1, x, y - 1], k, [0] * 3
            ),
            [torch.ones(3, device=device), torch.ones(3, 2, device=device)[:, 0]],
        ),
        "observe_": (
            lambda s, t, w: observe_(
                s,
                t,
                past,
                steps,
                logits,
                target,
                False,
                -100,
                False,
                "accuracy",
                0.1,
                1.0,
                "metric",
                w,
            ),
            [state, totals.clone(), status.clone()],
        ),
        "derive_": (
            lambda s: derive_(s, totals, past, steps, True, 0.1, 1.0, "agm"),
            [state.clone()],
        ),
        "remember_": (
            lambda p, n: remember_(p, n, state[0].clone(), totals, None, True),
            [past.clone(), steps.clone()],
        ),
        "accumulate_speeds_": (
            lambda t: accumulate_speeds_(rows, member, t, None),
            [torch.zeros(1, dtype=torch.float64, device=device)],
        ),
    }


WRITES = list(writes(torch.device("cpu")))


@pytest.mark.parametrize("name", WRITES)
def test_bumps_the_version_of_what_is_written(backend: Backend, name: str) -> None:
    call, written = writes(backend.device)[name]
    before = [each._version for each in written]
    call(*written)
    assert all(each._version > one for each, one in zip(written, before, strict=True))


def test_a_backward_that_saved_what_was_written_raises(backend: Backend) -> None:
    x = torch.ones(3, device=backend.device, requires_grad=True)
    saved = 2 * x.detach()
    loss = (x * saved).sum()
    functional.modulate_([saved], torch.tensor([0.5], device=backend.device), [0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", WRITES)
def test_inference_tensors(backend: Backend, name: str) -> None:
    """Written in inference mode only, as by torch's own operations."""
    call, written = writes(backend.device)[name]
    with torch.inference_mode():
        made = [each.clone() for each in written]
        call(*[each.clone() for each in written])
    for index in range(len(written)):
        given = [made[i] if i == index else each for i, each in enumerate(written)]
        if name in ("modulate_", "pareto_", "pull_") and index == 1:
            continue  # of a list the first tensor is asked
        before = [each.clone() for each in given]
        with pytest.raises(RuntimeError, match=rf"^{name}: \w+ must not be inference tensors"):
            call(*given)
        assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


def test_a_generator_of_gradients(backend: Backend) -> None:
    x = torch.ones(3, device=backend.device)
    with pytest.raises(
        TypeError, match=r"^modulate_: grads must be a list or .* \(got generator\)$"
    ):
        functional.modulate_((each for each in [x]), x[:1] / 2, [0])  # type: ignore[arg-type]
    assert x.tolist() == [1, 1, 1]


# --- transforms of torch.func


@pytest.mark.parametrize("name", functional.__all__)
def test_transforms_of_torch_func_are_refused_by_name(native: Backend, name: str) -> None:
    ones = torch.ones(2, 2, 3, device=native.device)
    target = torch.zeros(2, dtype=torch.int64, device=native.device)
    traced: dict[str, Callable[[Tensor], object]] = {
        "contribution_scores": lambda x: functional.contribution_scores([x, x], target),
        "discrepancy_ratios": lambda x: functional.discrepancy_ratios(x[0]),
        "modulation_coefficients": lambda x: functional.modulation_coefficients(x[0], 0.1),
        "gradient_dots": lambda x: functional.gradient_dots([x], [x]),
        "gradient_moments": lambda x: functional.gradient_moments([x]),
        "squared_norms": lambda x: functional.squared_norms([x], [0]),
        "modulate_": lambda x: functional.modulate_([x], target.float()[:1], [0]),
        "noise_like": lambda x: functional.noise_like(x, seed=0, step=0),
        "pareto_": lambda x: functional.pareto_([x], [x], [0], 1),
        "pull_": lambda x: functional.pull_([x], [x], [x], target.float()[:1], [0]),
    }
    if name not in traced:
        pytest.skip("plain PyTorch, or differentiable by it: see test_blending.py")
    message = r": must not be called within a transform of torch.func.*mmbal_fast.reference has it"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.vmap(traced[name])(ones)
