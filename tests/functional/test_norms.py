"""`squared_norms` against exact sums of Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmbal_fast import functional, reference


def exact(tensors: list[Tensor | None], groups: list[int], count: int) -> list[float]:
    squares: list[list[float]] = [[] for _ in range(count)]
    for tensor, group in zip(tensors, groups, strict=True):
        if tensor is not None:
            squares[group] += [float(x) ** 2 for x in tensor.flatten().tolist()]
    return [math.fsum(each) for each in squares]


def tensors(dtype: torch.dtype) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in [(7,), (3, 4, 5), (), (64, 33)]]
    return [made[0].to(dtype), None, made[1].to(dtype), torch.empty(0, dtype=dtype)] + [
        each.to(dtype) for each in made[2:]
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sums_squares_of_each_group(dtype: torch.dtype) -> None:
    given, groups = tensors(dtype), [2, 0, 0, 1, 2, 0]
    found = functional.squared_norms(given, groups)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(exact(given, groups, 3), rel=1e-6)
    assert found[1] == 0


def test_reads_views_in_any_layout() -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    views = [base.transpose(0, 2), base[:, ::2], base[0, 0].expand(5, 4), base.flip(1)]
    found = functional.squared_norms(views, [0, 1, 2, 3])
    assert found.tolist() == pytest.approx(exact(list(views), [0, 1, 2, 3], 4), rel=1e-6)


def test_is_accurate_far_from_zero_and_at_the_ends_of_the_range() -> None:
    offset = torch.randn(4096, generator=torch.Generator().manual_seed(1)) + 1e4
    huge = torch.full((3,), 6e4, dtype=torch.float16)
    tiny = torch.full((3,), 1e-30)
    found = functional.squared_norms([offset, huge, tiny], [0, 1, 2])
    assert found.tolist() == pytest.approx(exact([offset, huge, tiny], [0, 1, 2], 3), rel=1e-6)


def test_number_of_groups_may_exceed_those_used() -> None:
    found = functional.squared_norms([torch.ones(2)], [1], num_groups=4)
    assert found.tolist() == pytest.approx([0, 2, 0, 0])
    assert functional.squared_norms([None, None], [0, 1]).tolist() == [0, 0]


def test_keeps_non_finite_values_in_their_group() -> None:
    given = [torch.tensor([1.0, torch.inf]), torch.tensor([torch.nan]), torch.ones(4)]
    found = functional.squared_norms(given, [0, 1, 2])
    assert found[0] == torch.inf
    assert found[1].isnan()
    assert found[2] == 4


def test_has_no_graph() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    assert not functional.squared_norms([parameter], [0]).requires_grad
    assert not reference.squared_norms([parameter], [0]).requires_grad


def test_equals_the_reference() -> None:
    given, groups = tensors(torch.float32), [2, 0, 0, 1, 2, 0]
    torch.testing.assert_close(
        functional.squared_norms(given, groups),
        reference.squared_norms(given, groups),
        rtol=1e-6,
        atol=0.0,
    )


@pytest.mark.parametrize(
    ("given", "groups", "error", "message"),
    [
        ([torch.ones(1)], [], ValueError, r"one number for each tensor \(got 0 for 1 tensors\)"),
        ([], [], ValueError, r"at least one group \(got 0\)"),
        ([torch.ones(1)], [-1], ValueError, r"at least one group \(got 0\)"),
        ([None, torch.ones(1)], [1, -1], ValueError, r"in \[0, 2\) \(got -1 for tensor 1\)"),
        ([torch.ones(1, dtype=torch.int64)], [0], TypeError, r"got torch.int64 for tensor 0"),
        ([torch.ones(1, dtype=torch.complex64)], [0], TypeError, r"got torch.complex64"),
        ([torch.ones(1).to_sparse()], [0], TypeError, r"dense \(got torch.sparse_coo"),
        ([torch.ones(1, device="meta")], [0], TypeError, r"got tensor 0 on device meta"),
    ],
)
def test_refuses(
    given: list[Tensor | None], groups: list[int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"squared_norms: .*{message}"):
        functional.squared_norms(given, groups)


def test_refuses_a_group_beyond_the_number_of_groups() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 2\) \(got 2 for tensor 0\)"):
        functional.squared_norms([torch.ones(1)], [2], num_groups=2)
