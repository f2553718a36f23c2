"""Dot products over pairs of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from mmbal_fast import reference
from mmbal_fast.functional import gradient_dots
from tests.functional.lists import CHUNK, DTYPES, layouts, same_bits_everywhere, split

if TYPE_CHECKING:
    from tests.conftest import Backend


def exact(first: Tensor, second: Tensor) -> list[float]:
    x, y = first.double(), second.double()
    return [math.fsum(each.tolist()) for each in (x * x, x * y, y * y)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_rounded_once(backend: Backend, dtype: torch.dtype) -> None:
    first, second = split(backend.device, dtype, 2)
    expected = torch.tensor(
        [exact(*pair) for pair in zip(first, second, strict=True)], dtype=torch.float64
    )
    dots = gradient_dots(first, second)
    assert dots.dtype == torch.float64
    assert dots.device.type == backend.device.type
    scale = (expected[:, 0] * expected[:, 2]).sqrt().unsqueeze(1)
    assert ((dots.cpu() - expected).abs() <= 1e-14 * scale.clamp(min=expected.abs())).all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_beyond_float32(backend: Backend, size: float) -> None:
    x = torch.full((100,), size, device=backend.device)
    one = float(x[0].double())
    for value in gradient_dots([x], [-x])[0].tolist():
        assert abs(value) == pytest.approx(100 * one * one, rel=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_pair_elements_by_position(backend: Backend, dtype: torch.dtype) -> None:
    first, second = torch.randn(2, 6, 5, 9, 8, dtype=torch.float64).to(backend.device, dtype)
    expected = gradient_dots([first], [second])
    for one in layouts(first).values():
        for other in layouts(second).values():
            torch.testing.assert_close(gradient_dots([one], [other]), expected, rtol=1e-12, atol=0)


def test_none_and_empty_have_rows_of_zeros(backend: Backend) -> None:
    x, empty = torch.ones(3, device=backend.device), torch.ones(0, device=backend.device)
    first: list[Tensor | None] = [None, x, empty, x, x, None]
    second: list[Tensor | None] = [x, None, empty, 2 * x, empty, None]
    assert gradient_dots(first, second).tolist() == [
        [3.0, 6.0, 12.0] if row == 3 else [0.0] * 3 for row in range(6)
    ]
    assert gradient_dots([], []).shape == (0, 3)
    assert gradient_dots([None], [None]).tolist() == [[0.0] * 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(backend: Backend, value: float) -> None:
    x, y = torch.ones(2, CHUNK + 5, device=backend.device)
    y[CHUNK] = value
    dots = gradient_dots([x, x], [y, x])
    assert dots.isfinite().tolist() == [[True, False, False], [True] * 3]


def test_more_pairs_than_a_launch_takes(native: Backend) -> None:
    first = [torch.full((1 + i % 3,), 1.0 + i, device=native.device) for i in range(1400)]
    second = [2 * each for each in first]
    assert torch.equal(gradient_dots(first, second), reference.gradient_dots(first, second))


def test_same_bits_for_any_thread_count_and_instruction_set(cpu: Backend) -> None:
    same_bits_everywhere(cpu, "results = [functional.gradient_dots(*lists(2, dtype))]")


BAD: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "shape": (
        lambda x: [x[:2]],
        ValueError,
        r"second\[0\] must have the shape of first\[0\] \(got \[2\] and \[3\]\)",
    ),
    "view": (lambda x: [x.view(3, 1)], ValueError, r"must have the shape of first\[0\] \(got"),
    "dtype": (
        lambda x: [x.double()],
        ValueError,
        r"must have the dtype of first\[0\] \(got torch.float64 and torch.float32\)",
    ),
    "length": (
        lambda x: [x, x],
        ValueError,
        r"first and second must be equally long \(got 1 and 2",
    ),
    "meta": (lambda x: [x.to("meta")], TypeError, r"second\[0\] must be a plain"),
    "integer": (lambda x: [x.long()], TypeError, r"second\[0\] must be float32"),
    "sparse": (
        lambda x: [x.to_sparse()],
        TypeError,
        r"second\[0\] must be a plain",
    ),
    "expanded": (lambda x: [x[:1].expand(3)], RuntimeError, r"must not share memory"),
}


@pytest.mark.parametrize("kind", BAD)
def test_refuses(backend: Backend, kind: str) -> None:
    x = torch.ones(3, device=backend.device)
    make, error, message = BAD[kind]
    with pytest.raises(error, match=f"^gradient_dots: .*{message}"):
        gradient_dots([x], make(x))


def test_as_an_operation_of_a_graph(native: Backend) -> None:
    if native.name == "cuda-emulated":
        pytest.skip("what is checked does not depend on the kernels")
    first, second = (each[:4] for each in split(native.device, torch.float32, 2))
    torch.library.opcheck(torch.ops.mmbal.gradient_dots.default, (first, second))
    given: tuple[list[Tensor | None], ...] = ([*first, None], [*second, first[0]])
    compiled = torch.compile(gradient_dots, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), gradient_dots(*given))
