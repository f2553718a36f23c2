"""Features that are dropped before a fusion: draws, scaling, gradients, in one launch each way."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from mmbal_fast import _backend, functional, reference
from mmbal_fast.functional._drop_features import drop
from tests.host_reads import host_reads

if TYPE_CHECKING:
    from tests.conftest import Backend

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
RATIOS = [3.0, 0.5, 1.7]


def features_of(device: torch.device, dtype: torch.dtype, batch: int = 37) -> list[Tensor]:
    """Of several widths and layouts."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 5), (batch, 4, 6, 3), (batch, 70)]
    a, b, c = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return [a, b.to(memory_format=torch.channels_last), c[:, ::2]]


def ratios_on(device: torch.device) -> Tensor:
    return torch.tensor(RATIOS, device=device)


OPTIONS: dict[str, Any] = {"base": 0.6, "strength": 0.4, "seed": 2**64 - 3, "step": 5, "stream": 9}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_reference_to_the_bit(native: Backend, dtype: torch.dtype) -> None:
    features = features_of(native.device, dtype)
    ratios = ratios_on(native.device)
    found, weight, q = functional.drop_features(features, ratios, **OPTIONS)
    expected, weight_too, q_too, _ = reference.drop_features(features, ratios, **OPTIONS)
    assert torch.equal(q, q_too)
    assert torch.equal(weight, weight_too)
    assert weight.dtype == dtype
    for one, other, given in zip(found, expected, features, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == given.dtype
        rows = (one != 0).flatten(1)
        assert torch.equal(rows.any(1), rows.all(1))  # whole samples
    assert found[1].is_contiguous(memory_format=torch.channels_last)
    assert 0.6 < q[0] < 1
    assert q[1] == 0


def test_types_may_differ(backend: Backend) -> None:
    features = [torch.ones(20, 4, device=backend.device, dtype=each) for each in DTYPES[:3]]
    found, _, q = functional.drop_features(features, ratios_on(backend.device), **OPTIONS)
    factor = 1 / (1 - q.double().mean().item())
    assert [each.dtype for each in found] == DTYPES[:3]
    for each in found:
        kept = each[each != 0].double()
        assert kept.tolist() == pytest.approx([factor] * len(kept), rel=1e-3)


def test_draws(backend: Backend) -> None:
    """Of the right frequency; others for another step, seed, stream and modality."""
    batch = 4000 if backend.native else 400
    ones = [torch.ones(batch, 1, device=backend.device)] * 2
    ratios = torch.tensor([2.0, 2.0], device=backend.device)

    def kept(**options: Any) -> Tensor:
        given = {"base": 0.5, "strength": 0.5, "seed": 1, "step": 0, **options}
        (first, second), weight, q = functional.drop_features(ones, ratios, **given)
        assert q.tolist() == pytest.approx([0.690399] * 2, abs=1e-6)
        assert torch.equal(weight, ((first + second) > 0).float().flatten())
        assert not torch.equal(first, second)
        return torch.cat([first, second]) != 0

    usual = kept()
    share = usual.double().mean().item()
    assert abs(share - 0.309601) < 5 * math.sqrt(0.31 * 0.69 / len(usual))
    assert torch.equal(kept(), usual)
    assert torch.equal(kept(step=torch.tensor([0], device=backend.device)), usual)
    torch.set_num_threads(1)
    assert torch.equal(kept(), usual)
    for other in ({"step": 1}, {"seed": 2}, {"stream": 3}, {"seed": 1 + 2**40}):
        assert not torch.equal(kept(**other), usual)
    # The second modality's stream is the one behind the first's.
    assert torch.equal(kept(stream=2)[:batch], usual[batch:])


def test_a_batch_is_left_alone_with_the_rest_of_the_probability(backend: Backend) -> None:
    ones = [torch.ones(3, 2, device=backend.device)] * 2
    ratios = torch.tensor([9.0, 0.1], device=backend.device)
    steps = 300 if backend.native else 60
    applied = 0
    for step in range(steps):
        features, _, q = functional.drop_features(
            ones, ratios, base=1.0, strength=0.0, apply=0.7, step=step
        )
        left = torch.equal(features[0], ones[0]) and torch.equal(features[1], ones[1])
        assert q.tolist() == ([0.0, 0.0] if left else [1.0, 0.0])
        applied += not left
    assert abs(applied / steps - 0.7) < 4.5 * math.sqrt(0.21 / steps)


def test_what_is_dropped_is_zero_whatever_it_was(backend: Backend) -> None:
    """Also where everything is dropped, and nothing is left to scale."""
    spoiled = torch.full((6, 3), torch.nan, device=backend.device).requires_grad_()
    ratios = torch.tensor([9.0, 9.0], device=backend.device)
    features, weight, q = functional.drop_features(
        [spoiled, spoiled], ratios, base=1.0, strength=0.0
    )
    assert weight.tolist() == [0.0] * 6
    assert q.tolist() == [1.0, 1.0]
    assert all(bool((each == 0).all()) for each in features)
    (features[0] * torch.nan).sum().backward()
    assert bool((spoiled.grad == 0).all())


@pytest.mark.parametrize("value", [math.nan, 1.0, 0.2])
def test_nobody_dominates(backend: Backend, value: float) -> None:
    features = features_of(backend.device, torch.float32)
    ratios = torch.full((3,), value, device=backend.device)
    found, weight, q = functional.drop_features(features, ratios, base=1.0, strength=1.0)
    assert all(torch.equal(one, other) for one, other in zip(found, features, strict=True))
    assert bool((weight == 1).all())
    assert bool((q == 0).all())


@pytest.mark.parametrize("batch", [0, 1, 1100])
def test_sizes(native: Backend, batch: int) -> None:
    features = [torch.randn(batch, width, device=native.device) for width in (1, 1100, 0)]
    found, weight, _ = functional.drop_features(features, ratios_on(native.device), **OPTIONS)
    expected, weight_too, _, _ = reference.drop_features(
        features, ratios_on(native.device), **OPTIONS
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(weight, weight_too)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(backend: Backend, dtype: torch.dtype) -> None:
    features = [each.requires_grad_() for each in features_of(backend.device, dtype)]
    found, weight, q = functional.drop_features(features, ratios_on(backend.device), **OPTIONS)
    assert not weight.requires_grad
    assert not q.requires_grad
    # Sums give gradients without memory of their own; the second is not used at all.
    (found[0].sum() + 3 * found[2].float().sum()).backward()
    factors = reference.drop_features(features, ratios_on(backend.device), **OPTIONS)[3]
    for m, scale in ((0, 1.0), (2, 3.0)):
        wide = factors[m].to(torch.float64 if dtype == torch.float64 else torch.float32)
        expected = (scale * wide.unsqueeze(1)).to(dtype).expand_as(features[m])
        assert torch.equal(features[m].grad, expected)
    assert features[1].grad is None or bool((features[1].grad == 0).all())


def test_differentiable_again_and_in_transforms(backend: Backend) -> None:
    features = [torch.randn(6, 2, device=backend.device, requires_grad=True) for _ in range(3)]
    ratios = ratios_on(backend.device)

    def loss(first: Tensor) -> Tensor:
        given = [first, *(each.detach() for each in features[1:])]
        results, _, _ = functional.drop_features(given, ratios, **OPTIONS)
        return (results[0] ** 3).sum()

    (grad,) = torch.autograd.grad(loss(features[0]), features[0], create_graph=True)
    grad.sum().backward()
    factor = reference.drop_features(features, ratios, **OPTIONS)[3][0].unsqueeze(1)
    torch.testing.assert_close(grad, 3 * features[0] ** 2 * factor**3)
    torch.testing.assert_close(features[0].grad, 6 * features[0] * factor**3)
    torch.testing.assert_close(torch.func.grad(loss)(features[0].detach()), grad.detach())


def test_a_launch_each_way_and_no_host_read(native: Backend) -> None:
    features = [each.requires_grad_() for each in features_of(native.device, torch.float32)[:2]]
    ratios = ratios_on(native.device)[:2].contiguous()
    step = torch.zeros(1, dtype=torch.int64, device=native.device)
    options = (0.6, 0.4, 1.0, 3, step, 1)

    def forward() -> list[Tensor]:
        return drop(features, ratios, *options, advance=True)[0]

    def backward(results: list[Tensor]) -> tuple[Tensor, ...]:
        ones = [torch.ones_like(each) for each in results]
        return torch.autograd.grad(results, features, ones)

    backward(forward())
    with host_reads() as found:
        backward(forward())
    assert found == []
    assert step.item() == 2
    if not native.emulated:
        return
    results = forward()
    ones = [torch.ones_like(each) for each in results]
    for run in (forward, lambda: torch.autograd.grad(results, features, ones)):
        native.native.begin_capture()
        run()
        assert len(native.native.end_capture()) == 1


@pytest.mark.parametrize("native", ["cuda-emulated", "cuda"], indirect=True)
def test_a_replayed_graph_draws_anew(native: Backend) -> None:
    from tests.methods.test_ogm_ge_stack import captured

    features, ratios = [torch.ones(40, 3, device=native.device)] * 2, ratios_on(native.device)[:2]
    step = torch.zeros(1, dtype=torch.int64, device=native.device)
    results = drop(features, ratios, 0.6, 0.4, 1.0, 3, step, 1, advance=True)
    expected = [drop(features, ratios, 0.6, 0.4, 1.0, 3, number, 1)[3].clone() for number in (1, 2)]
    assert not torch.equal(*expected)

    def again() -> None:
        scaled, weight, q, factors = results
        module: Any = _backend.native
        module.drop_features(
            features, scaled, ratios, 0.6, 0.4, 1.0, 3, step, 1, q, factors, weight, True, 1,
            _backend.workspace,
        )  # fmt: skip

    graph = captured(native, again)
    for number in (0, 1):
        graph.replay()
        assert torch.equal(results[3], expected[number])
    assert step.item() == 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": []}, ValueError, "features must hold at least one tensor"),
        ({"features": torch.ones(2, 3)}, TypeError, "features must be a list or tuple"),
        (
            {"features": [torch.ones(2, 3).long()] * 2},
            TypeError,
            "features must be float32, float64",
        ),
        ({"features": [torch.ones(())] * 2}, TypeError, r"features must be of shape \[B, ...\]"),
        ({"features": [torch.ones(2, 3).to_sparse()] * 2}, TypeError, "features must be a plain"),
        (
            {"features": [torch._efficientzerotensor((2, 3))] * 2},
            TypeError,
            "features must be a plain",
        ),
        (
            {"features": [torch.ones(2, 3), torch.ones(3, 3)]},
            ValueError,
            "features must be of one batch size",
        ),
        ({"ratios": torch.ones(3)}, ValueError, r"ratios must be \[2\]"),
        ({"ratios": torch.ones(2).double()}, TypeError, "ratios must be a float32 tensor"),
        ({"ratios": torch.ones(2).to_sparse()}, TypeError, "ratios must be a plain dense"),
        ({"base": 1.5}, ValueError, "base must be from 0 to 1"),
        ({"strength": -1}, ValueError, "strength must be a number from 0 on"),
        ({"apply": math.nan}, ValueError, "apply must be a number from 0 on"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
        ({"step": torch.ones(2).long()}, ValueError, "step must have one element"),
        ({"stream": 0}, ValueError, "stream must be from 1"),
        ({"stream": 2**32}, ValueError, "stream must be from 1"),
    ],
)
def test_bad_input(
    backend: Backend, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"features": [torch.ones(2, 3)] * 2, "ratios": torch.ones(2), **OPTIONS, **changes}
    given = {
        name: each.to(backend.device) if isinstance(each, Tensor) else each
        for name, each in given.items()
    }
    if isinstance(given["features"], list):
        given["features"] = [each.to(backend.device) for each in given["features"]]
    with pytest.raises(error, match=rf"^drop_features: {message}.*\(got"):
        functional.drop_features(**given)


def test_opcheck(native: Backend) -> None:
    if native.name == "cuda-emulated":
        pytest.skip("what is checked does not depend on the kernels")
    setting = torch.tensor(0.5, dtype=torch.float64)
    features = [each.requires_grad_() for each in features_of(native.device, torch.float32)]
    rest = (ratios_on(native.device), setting, setting, setting, 3, 5)
    for counter in (None, torch.tensor([5], device=native.device)):
        opcheck(torch.ops.mmbal.drop_features.default, (features, *rest, counter, 1, False))
    factors = torch.rand(3, 37, device=native.device)
    grads = [each.detach() for each in features]
    opcheck(torch.ops.mmbal.drop_features_backward.default, (grads, factors))


def test_compiled(backend: Backend) -> None:
    if backend.name == "cuda-emulated":
        pytest.skip("the compiler sees one operation, whatever runs it")
    ratios = ratios_on(backend.device)
    step = torch.tensor([5], device=backend.device)

    def run(features: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        options = {**OPTIONS, "step": step}
        return functional.drop_features([2 * each for each in features], ratios, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    grads = []
    for call in (run, compiled):
        features = [each.requires_grad_() for each in features_of(backend.device, torch.float32)]
        results, weight, q = call(features)
        torch.stack([(each**2).sum() for each in results]).sum().backward()
        grads.append([*(each.grad for each in features), *results, weight, q])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
