"""`squared_norms` against exact sums of Python floats, on every backend."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from mmbal_fast import _backend, functional, reference
from mmbal_fast.functional._accumulate_speeds import accumulate_speeds_

if TYPE_CHECKING:
    from tests.conftest import Backend


def exact(tensors: list[Tensor | None], groups: list[int], count: int) -> list[float]:
    squares: list[list[float]] = [[] for _ in range(count)]
    for tensor, group in zip(tensors, groups, strict=True):
        if tensor is not None:
            squares[group] += [float(x) ** 2 for x in tensor.flatten().tolist()]
    return [math.fsum(each) for each in squares]


def tensors(dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7,), (3, 4, 5), (0,), (), (64, 133)]
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [made[0], None, *made[1:]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sums_squares_of_each_group(backend: Backend, dtype: torch.dtype) -> None:
    given, groups = tensors(dtype, backend.device), [2, 0, 0, 1, 2, 0]
    found = functional.squared_norms(given, groups)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(exact(given, groups, 3), rel=1e-6)
    assert found[1] == 0


def test_reads_views_in_any_layout(backend: Backend) -> None:
    base = torch.arange(24.0, device=backend.device).reshape(2, 3, 4)
    views: list[Tensor | None] = [base.transpose(0, 2), base[:, ::2], base[1, 1:, 2]]
    found = functional.squared_norms(views, [0, 1, 2])
    assert found.tolist() == pytest.approx(exact(views, [0, 1, 2], 3), rel=1e-6)


def test_is_accurate_far_from_zero_and_at_the_ends_of_the_range(backend: Backend) -> None:
    offset = torch.randn(5000) + 1e4
    huge = torch.tensor([6e4, -6e4, 6e4], dtype=torch.float16)
    tiny = torch.tensor([1e-30, -1e-30, 3e-30])
    given: list[Tensor | None] = [each.to(backend.device) for each in (offset, huge, tiny)]
    found = functional.squared_norms(given, [0, 1, 2])
    assert found.tolist() == pytest.approx(exact(given, [0, 1, 2], 3), rel=1e-6)


def test_number_of_groups_may_exceed_those_used(backend: Backend) -> None:
    found = functional.squared_norms([torch.ones(2, device=backend.device)], [1], num_groups=4)
    assert found.tolist() == pytest.approx([0, 2, 0, 0])
    assert functional.squared_norms([None, None], [0, 1]).tolist() == [0, 0]


def test_keeps_non_finite_values_in_their_group(backend: Backend) -> None:
    given = [torch.tensor([1.0, torch.inf]), torch.tensor([torch.nan]), torch.ones(4)]
    found = functional.squared_norms([each.to(backend.device) for each in given], [0, 1, 2])
    assert found.isfinite().tolist() == [False, False, True]
    assert found[2] == 4


def test_has_no_graph(backend: Backend) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, device=backend.device))
    assert not functional.squared_norms([parameter], [0]).requires_grad
    assert not reference.squared_norms([parameter], [0]).requires_grad


def test_equals_the_reference(native: Backend) -> None:
    given, groups = tensors(torch.float32, native.device), [2, 0, 0, 1, 2, 0]
    torch.testing.assert_close(
        functional.squared_norms(given, groups),
        reference.squared_norms(given, groups),
        rtol=1e-6,
        atol=0.0,
    )


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.ones(1, dtype=torch.int64), TypeError, r"\(got torch.int64\)"),
        (torch.ones(1, dtype=torch.complex64), TypeError, r"\(got torch.complex64\)"),
        (torch.ones(1).to_sparse(), TypeError, r"dense .*torch.sparse_coo"),
        (torch.ones(1, device="meta"), TypeError, r"on meta\)"),
        (torch.ones(1).expand(3), RuntimeError, r"not share memory .*\(0,\)"),
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_refuses_tensors(given: Tensor, error: type[Exception], message: str, native: bool) -> None:
    with (
        _backend.using(_backend.native if native else None),
        pytest.raises(error, match=rf"squared_norms: .*grads\[1\].*{message}"),
    ):
        functional.squared_norms([torch.ones(2), given], [0, 0])


@pytest.mark.parametrize(
    ("given", "groups", "message"),
    [
        ([torch.ones(1)], [], r"one integer per tensor \(got 0 for 1\)"),
        ([], [], r"at least one group \(got 0\)"),
        ([torch.ones(1)], [-1], r"at least one group \(got 0\)"),
        ([None, torch.ones(1)], [1, -1], r"in \[0, 2\) \(got \[1, -1\]\)"),
    ],
)
def test_refuses_groups(given: list[Tensor | None], groups: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"squared_norms: .*{message}"):
        functional.squared_norms(given, groups)


def test_refuses_a_group_beyond_the_number_of_groups() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 2\) \(got \[2\]\)"):
        functional.squared_norms([torch.ones(1)], [2], num_groups=2)


def test_reads_a_step_of_many_tensors_once(native: Backend) -> None:
    calls = 0
    module = native.native
    assert module is not None

    class Counting:
        def __getattr__(self, name: str) -> object:
            nonlocal calls
            calls += name == "moments"
            return getattr(module, name)

    given = [torch.ones(3, device=native.device) for _ in range(300)]
    with _backend.using(Counting()):  # type: ignore[arg-type]
        functional.squared_norms(given, [i % 7 for i in range(300)])
    assert calls == 1


def test_compiles_into_one_graph() -> None:
    given = [torch.ones(3), torch.full((2,), 2.0)]
    compiled = torch.compile(
        lambda x, y: functional.squared_norms([x, None, y], [0, 1, 1]),
        fullgraph=True,
        backend="aot_eager",
    )
    assert compiled(*given).tolist() == pytest.approx([3, 8])


@pytest.mark.parametrize("active", [None, True, False])
def test_speeds_equal_the_reference(backend: Backend, active: bool | None) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator) for n in (3, 70, 5, 9)]
    moments = functional.gradient_moments([each.to(backend.device) for each in tensors])
    membership = torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=torch.float64)
    totals = torch.tensor([1.0, 2.0], dtype=torch.float64).to(backend.device)
    gate = None if active is None else torch.tensor(active, device=backend.device)
    finite = accumulate_speeds_(moments.view(2, 2, 3), membership.to(backend.device), totals, gate)
    weight, other, gradient, last = (each.double().square().sum() for each in tensors)
    added = torch.stack([gradient / weight, (gradient / 2 + 2 * last) / (weight / 2 + 2 * other)])
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64) + (active is not False) * added
    torch.testing.assert_close(totals.cpu(), expected)
    assert bool(finite)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_speeds_stay_where_a_ratio_is_not_finite(backend: Backend, broken: float) -> None:
    moments = torch.tensor([[[2.0, 1.0, 0.0]] * 3, [[2.0, 1.0, 0.0]] * 3], dtype=torch.float64)
    moments[1, 1, 2] = broken
    members = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    totals = torch.ones(2, dtype=torch.float64, device=backend.device)
    at = backend.device
    assert not accumulate_speeds_(moments.to(at), members.to(at), totals, None)
    assert totals.tolist() == [1.0, 1.0]
    # A tensor that is in no group may be what it wants.
    outside = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert accumulate_speeds_(moments.to(at), outside.to(at), totals, None)
    assert totals.tolist() == [2.0, 2.0]
