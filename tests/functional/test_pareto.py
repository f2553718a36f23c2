"""The gradients of two losses, combined: against MMPareto's rules on exact numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from mmbal_fast import reference
from mmbal_fast.functional import gradient_dots, pareto_
from tests.functional.lists import DTYPES, SIZES, layouts, same_bits_everywhere, split

if TYPE_CHECKING:
    from tests.conftest import Backend

TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def combined(
    total: list[Tensor], own: list[Tensor], gamma: float = 1.5
) -> tuple[float, float, list[Tensor]]:
    """Cosine, weight and result of one modality, as the released code computes them."""
    pairs = [(g.double() - x.double(), x.double()) for g, x in zip(total, own, strict=True)]
    one, other = (torch.cat([each.flatten() for each in side]) for side in zip(*pairs, strict=True))
    a, b, c = float(one @ one), float(one @ other), float(other @ other)
    cosine = b / math.sqrt(a * c) if a * c > 0 else 0.0
    if cosine > 0:
        weight = 0.5
    elif b >= a:
        weight = 0.999
    else:
        weight = 0.001 if b >= c else (c - b) / (a + c - 2 * b)
    results = []
    for g1, g2 in pairs:
        h = 2 * (weight * g1 + (1 - weight) * g2)
        longer = (g1 + g2).norm() / h.norm()
        results.append(gamma * h * (longer if longer > 1 else 1.0))
    return cosine, weight, results


def conflicting(total: list[Tensor], own: list[Tensor]) -> None:
    """Turns G = g1 + g2 into one whose g1 works against g2."""
    for g, x in zip(total, own, strict=True):
        g.copy_((0.3 * g.double() - 0.2 * x.double()).to(g.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_released_rules(backend: Backend, dtype: torch.dtype) -> None:
    """One modality in conflict, one without, one whose own gradients are zero."""
    total, own = split(backend.device, dtype, 2)
    modality = [index % 3 for index in range(len(SIZES))]
    of = [[i for i, m in enumerate(modality) if m == which] for which in range(3)]
    conflicting([total[i] for i in of[0]], [own[i] for i in of[0]])
    for i in of[1]:
        total[i].copy_(total[i] + 2 * own[i])
    for i in of[2]:
        own[i].zero_()
    expected = [combined([total[i] for i in each], [own[i] for i in each]) for each in of]
    found = pareto_(total, own, modality, 3)
    assert found.dtype == torch.float64
    cosines, weights = found.tolist()
    assert weights[1:] == [0.5, 0.001]
    assert 0.4 < weights[0] < 0.49  # in between
    tolerance = TOLERANCES[dtype]
    for which, (cosine, weight, results) in enumerate(expected):
        assert cosines[which] == pytest.approx(cosine, abs=1e-12)
        assert weights[which] == pytest.approx(weight, abs=1e-12)
        for index, result in zip(of[which], results, strict=True):
            scale = result.abs().max().item() + own[index].abs().max().item()
            error = (total[index].double() - result).abs().max().item()
            assert error <= tolerance * scale, (which, index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_meet_by_position(backend: Backend, dtype: torch.dtype) -> None:
    total, own = torch.randn(2, 6, 5, 9, 8, dtype=torch.float64).to(backend.device, dtype)
    conflicting([total], [own])
    plain = total.clone()
    numbers = pareto_([plain], [own], [0], 1)
    # float16 alone: sums in another order may round another way
    tolerance = 0.0 if dtype == torch.float64 else TOLERANCES[dtype]
    for name, other in (
        *((name, name) for name in layouts(total)),
        ("contiguous", "shifted"),
        ("sliced", "channels_last"),
        ("channels_last", "negated"),
    ):
        g = layouts(total)[name]
        found = pareto_([g], [layouts(own)[other]], [0], 1)
        torch.testing.assert_close(found, numbers, rtol=1e-12, atol=0)
        torch.testing.assert_close(g, plain, rtol=max(tolerance, 1e-12), atol=0)


def test_none_and_empty_count_for_nothing(backend: Backend) -> None:
    x, empty = torch.ones(3, device=backend.device), torch.ones(0, device=backend.device)
    grads = [None, x.clone(), 2 * x, empty]
    own = [x, None, x, empty]
    cosines, weights = pareto_(grads, own, [0, 0, 1, 1], 3).tolist()
    assert cosines == pytest.approx([0.0, 1.0, 0.0])
    assert weights == [0.999, 0.5, 0.999]
    assert [None if each is None else each.tolist() for each in grads] == [
        None, [1.0] * 3, [3.0] * 3, [],
    ]  # fmt: skip
    assert pareto_([], [], [], 2).tolist() == [[0.0, 0.0], [0.999, 0.999]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_keeps_its_modality_as_it_is(backend: Backend, value: float) -> None:
    grads = [torch.full((5000,), 1.0 + i, device=backend.device) for i in range(4)]
    own = [torch.full((5000,), -3.0, device=backend.device) for _ in range(4)]
    own[1][4500] = value
    weights = pareto_(grads, own, [0, 1, 1, 0], 2)[1]
    assert weights.isnan().tolist() == [False, True]
    assert [each.unique().tolist() for each in grads[1:3]] == [[2.0], [3.0]]
    assert grads[0][0] != 1
    assert all(each.isfinite().all() for each in grads)


def test_float16_stays_finite_where_it_was(backend: Backend) -> None:
    g = torch.tensor([60000.0, -60000.0, 1.0] * 5).to(backend.device, torch.float16)
    pareto_([g], [g.clone()], [0], 1)
    assert g.tolist() == [65504.0, -65504.0, 1.5] * 5


def test_own_gradients_that_are_still_scaled(backend: Backend) -> None:
    for dtype in (torch.float32, torch.float64):
        # Clones, as all below, which begin at addresses alike: these order the sums.
        total, own = ([t.clone() for t in each[-4:]] for each in split(backend.device, dtype, 2))
        conflicting(total[:2], own[:2])
        copies = [each.clone() for each in total]
        scale = torch.tensor(2.0**10, device=backend.device)
        expected = pareto_(copies, own, [0, 0, 1, 1], 2, gamma=1.0)
        scaled = [each * 2.0**10 for each in own]
        found = pareto_(total, scaled, [0, 0, 1, 1], 2, gamma=1.0, scale=scale)
        assert torch.equal(found, expected)  # of powers of two
        assert all(torch.equal(x, y) for x, y in zip(total, copies, strict=True))


def test_dots_of_whole_tensors_may_be_given(backend: Backend) -> None:
    total, own = ([t.clone() for t in each[2:]] for each in split(backend.device, torch.float32, 2))
    conflicting(total, own)
    modality = [index % 2 for index in range(len(total))]
    whole = [each.clone() for each in total]
    expected = pareto_(whole, own, modality, 2)
    dots = gradient_dots(total, own)
    for part in (slice(None, 2), slice(2, None)):
        mine, other = ([each[part] for each in tensors] for tensors in (total, own))
        assert torch.equal(pareto_(mine, other, modality, 2, dots=dots), expected)
    assert all(torch.equal(x, y) for x, y in zip(total, whole, strict=True))


def test_more_pairs_than_a_launch_takes(native: Backend) -> None:
    sizes = [8 + i % 3 for i in range(1400)]
    total, own = (list(torch.randn(sum(sizes)).to(native.device).split(sizes)) for _ in range(2))
    modality = [i % 3 for i in range(1400)]
    conflicting(total[::3], own[::3])
    copies = [each.clone() for each in total]
    dots = gradient_dots(total, own)
    for given in (None, dots):
        mine = [each.clone() for each in copies]
        found = pareto_(mine, own, modality, 3, dots=given)
        theirs = [each.clone() for each in copies]
        expected = reference.pareto_(theirs, own, modality, 3)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.cat(mine), torch.cat(theirs), rtol=1e-5, atol=1e-6)


def test_same_bits_for_any_thread_count_and_instruction_set(cpu: Backend) -> None:
    same_bits_everywhere(
        cpu,
        """
    total, own = lists(2, dtype)
    for g, x in zip(total[:2], own):
        g.sub_(2 * x)
    results = [functional.pareto_(total, own, [0, 0, 1, 1], 2), *total]
""",
    )


Case = tuple[Callable[[Tensor], dict[str, Any]], type[Exception], str]
BAD: dict[str, Case] = {
    "shape": (
        lambda x: {"own": [x[:2].clone()]},
        ValueError,
        r"own\[0\] must have the shape of grads\[0\] \(got \[2\] and \[3\]\)",
    ),
    "dtype": (
        lambda x: {"own": [x.double()]},
        ValueError,
        r"own\[0\] must have the dtype of grads\[0\] \(got torch.float64 and torch.float32\)",
    ),
    "length": (
        lambda x: {"own": [x.clone(), x.clone()]},
        ValueError,
        r"grads and own must be equally long \(got 1 and 2\)",
    ),
    "integer": (lambda x: {"own": [x.long()]}, TypeError, r"own\[0\] must be float32"),
    "same memory": (
        lambda x: {"own": [x]},
        ValueError,
        r"grads\[0\] must not share memory with another tensor \(got own\[0\] beside it\)",
    ),
    "modality": (
        lambda x: {"modality": [1]},
        ValueError,
        r"must belong to a modality from 0 to 0 \(got 1\)",
    ),
    "no modalities": (
        lambda x: {"modalities": 0},
        ValueError,
        r"modalities must be from 1 to 2147483647 \(got 0\)",
    ),
    "gamma": (lambda x: {"gamma": -1.0}, ValueError, r"gamma must be a number from 0 on \(got -1"),
    "dots": (lambda x: {"dots": x.double()}, ValueError, r"dots must have shape \[1, 3\] \(got"),
    "scale": (lambda x: {"scale": x}, ValueError, r"scale must have one element \(got shape \[3"),
}


@pytest.mark.parametrize("kind", BAD)
def test_refuses_before_anything_is_written(backend: Backend, kind: str) -> None:
    x = torch.ones(3, device=backend.device)
    make, error, message = BAD[kind]
    given: dict[str, Any] = {"grads": [x], "own": [x + 1], "modality": [0], "modalities": 1}
    with pytest.raises(error, match=f"^pareto_: .*{message}"):
        pareto_(**(given | make(x)))
    assert x.tolist() == [1, 1, 1]


@pytest.mark.parametrize("native", ["cuda-emulated"], indirect=True)
def test_launches(native: Backend) -> None:
    """Two, the first of which derives; three where ranks add up the dot products in between."""
    assert native.native is not None
    total, own = split(native.device, torch.float32, 2)
    modality = [0] * len(SIZES)
    dots = torch.zeros(len(SIZES), 3, dtype=torch.float64)
    pareto_(total, own, modality, 1)  # allocates
    gradient_dots(total, own)
    before = [each.clone() for each in total]
    for expected, run in (
        (2, lambda: pareto_(total, own, modality, 1)),
        (2, lambda: pareto_(total, own, modality, 1, dots=dots)),
        (1, lambda: gradient_dots(total, own)),
    ):
        native.native.begin_capture()
        try:
            run()
        finally:
            launches = native.native.end_capture()
        assert len(launches) == expected
    assert all(torch.equal(x, y) for x, y in zip(total, before, strict=True))  # captured, not run


def test_as_an_operation_of_a_graph(native: Backend) -> None:
    if native.name == "cuda-emulated":
        pytest.skip("what is checked does not depend on the kernels")
    total, own = (each[:4] for each in split(native.device, torch.float32, 2))
    gamma = torch.tensor(1.5, dtype=torch.float64)
    operation = torch.ops.mmbal.pareto_.default
    torch.library.opcheck(operation, (total, own, [0, 0, 1, 1], 2, gamma, None, None))
    copies = [each.clone() for each in total]
    compiled = torch.compile(pareto_, fullgraph=True, backend="aot_eager")
    found = compiled([*total, None], [*own, None], [0, 0, 1, 1, 1], 2, gamma=gamma)
    expected = pareto_([*copies, None], [*own, None], [0, 0, 1, 1, 1], 2)
    assert torch.equal(found, expected)
    assert all(torch.equal(x, y) for x, y in zip(total, copies, strict=True))
