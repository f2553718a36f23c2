"""Gradients pulled towards earlier weights, and their squares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from mmbal_fast import reference
from mmbal_fast.functional import pull_
from tests.functional.lists import DTYPES, SIZES, layouts, same_bits_everywhere, split

if TYPE_CHECKING:
    from tests.conftest import Backend

TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-15, torch.float16: 1e-3, torch.bfloat16: 1e-2}
BETA = [0.5, 0.0, -2.0, float("nan")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_exact_numbers(backend: Backend, dtype: torch.dtype) -> None:
    grads, weights, anchors = split(backend.device, dtype, 3)
    before = [each.double().clone() for each in grads]
    modality = [index % 4 for index in range(len(SIZES))]
    squares = pull_(grads, weights, anchors, torch.tensor(BETA, device=backend.device), modality)
    assert squares.dtype == torch.float64
    for index, (g, old) in enumerate(zip(grads, before, strict=True)):
        beta = BETA[modality[index]]
        if beta == 0 or beta != beta:
            assert torch.equal(g.double(), old)
        else:
            exact = old + beta * (weights[index].double() - anchors[index].double())
            tolerance = TOLERANCES[dtype]
            torch.testing.assert_close(g.double(), exact, rtol=tolerance, atol=4 * tolerance)
        expected = math.fsum((g.double() ** 2).tolist())
        assert squares[index].item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_meet_by_position(backend: Backend, dtype: torch.dtype) -> None:
    base = torch.randn(3, 6, 5, 9, 8, dtype=torch.float64).to(backend.device, dtype)
    beta = torch.tensor([0.5], device=backend.device)
    plain = [each.clone() for each in base]
    squares = pull_([plain[0]], [plain[1]], [plain[2]], beta, [0])
    for name, mine in layouts(base[0]).items():
        others = layouts(base[1]), layouts(base[2])
        for one, other in ((name, name), ("contiguous", "contiguous"), ("shifted", "sliced")):
            g = layouts(base[0])[name]
            assert g.stride() == mine.stride()
            found = pull_([g], [others[0][one]], [others[1][other]], beta, [0])
            assert torch.equal(g, plain[0]), (name, one, other)
            torch.testing.assert_close(found, squares, rtol=1e-12, atol=0)


def test_none_and_empty_are_left_alone(backend: Backend) -> None:
    def ones() -> Tensor:
        return torch.ones(3, device=backend.device)

    x, empty = ones(), torch.ones(0, device=backend.device)
    beta = torch.tensor([1.0], device=backend.device)
    grads = [None, ones(), ones(), empty, ones()]
    weights = [x, None, 2 * x, empty, 3 * x]
    anchors = [x, x, None, empty, x]
    assert pull_(grads, weights, anchors, beta, [0] * 5).tolist() == [0.0, 0.0, 0.0, 0.0, 27.0]
    assert [None if each is None else each.tolist() for each in grads] == [
        None, [1.0] * 3, [1.0] * 3, [], [3.0] * 3,
    ]  # fmt: skip
    assert pull_([], [], [], beta, []).shape == (0,)
    assert pull_([None], [None], [None], beta, [0]).tolist() == [0.0]


def test_what_is_not_finite_stays_where_it_is(backend: Backend) -> None:
    device = backend.device
    g, theta, anchor = torch.ones(3, 5000, device=device).unbind()
    g[4100], theta[17] = math.inf, math.nan
    for beta, broken in ((0.0, {4100}), (1.0, {17, 4100})):
        mine = g.clone()
        squares = pull_([mine], [theta], [anchor], torch.tensor([beta], device=device), [0])
        assert not squares.isfinite().item()
        assert {*(~mine.isfinite()).nonzero().flatten().tolist()} == broken


def test_float16_stays_finite_where_it_was(backend: Backend) -> None:
    g = torch.tensor([60000.0, -60000.0, math.inf, 1.0] * 5).to(backend.device, torch.float16)
    theta = torch.tensor([60000.0, -60000.0, 0.0, 0.0] * 5).to(backend.device, torch.float16)
    pull_([g], [theta], [0 * theta], torch.tensor([1.0], device=backend.device), [0])
    assert g.tolist() == [65504.0, -65504.0, math.inf, 1.0] * 5


def test_more_tensors_than_a_launch_takes(native: Backend) -> None:
    grads, weights, anchors = (
        [torch.full((1 + i % 3,), a + i, device=native.device) for i in range(1300)]
        for a in (1.0, 2.0, 0.5)
    )
    copies = [each.clone() for each in grads]
    beta = torch.tensor([0.5, 0.25], device=native.device)
    modality = [i % 2 for i in range(1300)]
    squares = pull_(grads, weights, anchors, beta, modality)
    assert torch.equal(squares, reference.pull_(copies, weights, anchors, beta, modality))
    assert all(torch.equal(one, other) for one, other in zip(grads, copies, strict=True))


def test_same_bits_for_any_thread_count_and_instruction_set(cpu: Backend) -> None:
    same_bits_everywhere(
        cpu,
        """
    grads, weights, anchors = lists(3, dtype)
    results = [functional.pull_(grads, weights, anchors, torch.tensor([0.5]), [0] * 4), *grads]
""",
    )


Case = tuple[Callable[[Tensor], dict[str, Any]], type[Exception], str]
BAD: dict[str, Case] = {
    "shape": (
        lambda x: {"weights": [x[:2].clone()]},
        ValueError,
        r"weights\[0\] must have the shape of grads\[0\] \(got \[2\] and \[3\]\)",
    ),
    "dtype": (
        lambda x: {"anchors": [x.double()]},
        ValueError,
        r"anchors\[0\] must have the dtype of grads\[0\] \(got torch.float64 and torch.float32\)",
    ),
    "length": (
        lambda x: {"anchors": [x.clone(), x.clone()]},
        ValueError,
        r"grads and anchors must be equally long \(got 1 and 2\)",
    ),
    "meta": (lambda x: {"weights": [x.to("meta")]}, TypeError, r"weights\[0\] must be a plain"),
    "integer": (lambda x: {"weights": [x.long()]}, TypeError, r"weights\[0\] must be float32"),
    "sparse": (lambda x: {"grads": [x.to_sparse()]}, TypeError, r"grads\[0\] must be a plain"),
    "expanded": (
        lambda x: {"weights": [x[:1].expand(3)]},
        RuntimeError,
        r"weights\[0\] must not share memory between its elements",
    ),
    "same memory": (
        lambda x: {"weights": [x]},
        ValueError,
        r"grads\[0\] must not share memory with another tensor \(got weights\[0\] beside it\)",
    ),
    "memory in common": (
        lambda x: {
            "grads": [x, x[1:]],
            "weights": [x + 1, x[1:] + 1],
            "anchors": [x + 2, x[1:] + 2],
            "modality": [0, 0],
        },
        ValueError,
        r"grads\[0\] must not share memory with another tensor \(got grads\[1\] beside it\)",
    ),
    "memory in common with gaps": (
        lambda x: {"grads": [x[::2]], "weights": [x[1:]], "anchors": [x[1:] + 2]},
        ValueError,
        r"grads\[0\] must not share memory with another tensor \(got weights\[0\] beside it\)",
    ),
    "modalities": (
        lambda x: {"modality": []},
        ValueError,
        r"modality must .* per gradient \(got 0 for 1\)",
    ),
    "modality": (
        lambda x: {"modality": [1]},
        ValueError,
        r"must belong to a modality from 0 to 0 \(got 1\)",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_refuses_before_anything_is_written(backend: Backend, kind: str) -> None:
    x = torch.ones(3, device=backend.device)
    make, error, message = BAD[kind]
    given: dict[str, Any] = {
        "grads": [x],
        "weights": [x + 1],
        "anchors": [x + 2],
        "modality": [0],
    } | make(x)
    beta = torch.ones(1, device=backend.device)
    with pytest.raises(error, match=f"^pull_: .*{message}"):
        pull_(given["grads"], given["weights"], given["anchors"], beta, given["modality"])
    assert x.tolist() == [1, 1, 1]


def test_elements_beside_each_other_are_no_common_memory(backend: Backend) -> None:
    x = torch.arange(6.0, device=backend.device)
    beta = torch.ones(1, device=backend.device)
    pull_([x[::2]], [x[1::2]], [torch.zeros(3, device=backend.device)], beta, [0])
    assert x.tolist() == [1, 1, 5, 3, 9, 5]


def test_as_an_operation_of_a_graph(native: Backend) -> None:
    if native.name == "cuda-emulated":
        pytest.skip("what is checked does not depend on the kernels")
    grads, weights, anchors = (each[:4] for each in split(native.device, torch.float32, 3))
    beta, modality = torch.tensor([0.5], device=native.device), [0] * 4
    operation = torch.ops.mmbal.pull_.default
    torch.library.opcheck(operation, (grads, weights, anchors, beta, modality))
    copies = [each.clone() for each in grads]
    compiled = torch.compile(pull_, fullgraph=True, backend="aot_eager")
    others = [*weights, None], [*anchors, None], beta, [*modality, 0]
    found = compiled([*grads, None], *others)
    assert torch.equal(found, pull_([*copies, None], *others))
    assert all(torch.equal(one, other) for one, other in zip(grads, copies, strict=True))
