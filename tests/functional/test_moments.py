"""Count, mean and M2 against float64, wherever vectors and chunks begin and end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from mmbal_fast.functional import gradient_moments

if TYPE_CHECKING:
    from tests.conftest import Backend

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CHUNK = 4096  # of csrc/math/moments.h

# One less and one more than every vector, group, run of lanes and chunk of the kernels.
SIZES = sorted(
    {size + d for size in (4, 8, 16, 32, 64, 256, 1024, CHUNK, 2 * CHUNK) for d in (-1, 0, 1)}
    | {1, 2, 3 * CHUNK + 77}
)


def exact(grad: Tensor) -> list[float]:
    """The definition, in float64 on the values as they are stored."""
    values = grad.detach().cpu().double().flatten()
    mean = math.fsum(values.tolist()) / len(values)
    return [len(values), mean, math.fsum(((values - mean) ** 2).tolist())]


def assert_exact(rows: Tensor, grads: list[Tensor], rel: float = 1e-6) -> None:
    for row, grad in zip(rows.tolist(), grads, strict=True):
        count, mean, m2 = exact(grad)
        spread = math.sqrt(m2 / count)
        assert row[0] == count
        # The mean's error is measured in standard deviations where these are the larger.
        assert row[1] == pytest.approx(mean, rel=1e-7, abs=rel * spread + 1e-300)
        assert row[2] == pytest.approx(m2, rel=rel, abs=1e-300)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_every_edge(backend: Backend, dtype: torch.dtype) -> None:
    grads = [(torch.randn(size) + 0.5).to(backend.device, dtype) for size in SIZES]
    rows = gradient_moments(grads)
    assert rows.dtype == torch.float64
    assert rows.device.type == backend.device.type
    assert rows.shape == (len(SIZES), 3)
    assert_exact(rows, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_at_every_alignment(backend: Backend, dtype: torch.dtype) -> None:
    """As parameters in a flat bucket: 16 bytes hold up to eight elements."""
    flat = torch.randn(40 * CHUNK).to(backend.device, dtype)
    sizes = [5, 37, CHUNK - 1, CHUNK + 9]
    grads = [flat[start : start + size] for start in range(17) for size in sizes]
    assert_exact(gradient_moments(grads), grads)


@pytest.mark.parametrize("sign", [1, -1])
def test_mean_far_from_zero(backend: Backend, sign: int) -> None:
    """|mean| = 1e4 std: a float32 sum of squares would keep no digit of the variance."""
    grads = [sign * 1e4 + torch.randn(size, device=backend.device) for size in (100, 3 * CHUNK + 1)]
    grads += [(sign * 1e4 + torch.randn(CHUNK + 3, device=backend.device)) * 1e-6]
    assert_exact(gradient_moments(grads), grads, rel=1e-5)


def test_chunks_with_different_means(backend: Backend) -> None:
    grads = [
        torch.arange(5 * CHUNK + 3, device=backend.device) / CHUNK,
        torch.cat([torch.full((CHUNK,), 1e6), torch.randn(CHUNK)]).to(backend.device),
    ]
    assert_exact(gradient_moments(grads), grads)


@pytest.mark.parametrize("unlike", [1, 31, 256, 257, 2000])
@pytest.mark.parametrize("level", [1.1, 1e4])
def test_first_elements_unlike_the_rest(backend: Backend, unlike: int, level: float) -> None:
    """As where the first rows of an embedding saw no sample: none may stand for the chunk."""
    grads = []
    for spread in (0.0, 1e-3, 1.0):
        grad = torch.full((CHUNK + 50,), level) + spread * torch.randn(CHUNK + 50)
        grad[:unlike] = 0.0
        grads += [grad.to(backend.device), grad.flip(0).to(backend.device)]
    grads += [grad.to(torch.bfloat16) for grad in grads]
    assert_exact(gradient_moments(grads), grads, rel=1e-5)


# Squares of these leave the range of float32 above or below, some only in one chunk.
@pytest.mark.parametrize("size", [1, 3, 33, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("scale", [1e30, 3e37, 1e18, 1e-18, 1e-30, 1e-40])
def test_magnitudes(backend: Backend, scale: float, size: int) -> None:
    grads = [(torch.randn(size) * scale).to(backend.device)]
    grads += [(torch.randn(size) * scale).to(backend.device, torch.bfloat16)]
    assert_exact(gradient_moments(grads), grads, rel=1e-5)


def test_magnitudes_that_differ_within_a_tensor(backend: Backend) -> None:
    grad = torch.cat([torch.randn(CHUNK) * 1e25, torch.randn(CHUNK), torch.randn(99) * 1e-25])
    grads = [grad.to(backend.device), grad.flip(0).to(backend.device)]
    assert_exact(gradient_moments(grads), grads, rel=1e-5)


@pytest.mark.parametrize("scale", [1e150, 1e-150])
def test_magnitudes_of_float64(backend: Backend, scale: float) -> None:
    grads = [(torch.randn(CHUNK + 5).double() * scale).to(backend.device)]
    assert_exact(gradient_moments(grads), grads)


def test_largest_numbers_of_float64(backend: Backend) -> None:
    """Means are exact where sums of the elements would overflow; the squares do."""
    for size in (1, 300, CHUNK, 3 * CHUNK + 5):
        grad = torch.full((size,), 1.5e308, dtype=torch.float64)
        mixed = grad.clone()
        mixed[: size // 2] *= -1
        rows = gradient_moments([grad.to(backend.device), mixed.to(backend.device)])
        means = [1.5e308, 1.5e308 * ((size - size // 2) / size - size // 2 / size)]
        assert rows[:, 1].tolist() == pytest.approx(means, rel=1e-12, abs=1e296)
        assert rows[1, 2].item() == (0.0 if size == 1 else INF)


def test_extremes_of_float16(backend: Backend) -> None:
    grads = [
        torch.tensor([65504.0, -65504.0] * CHUNK),
        torch.full((100,), 65504.0),
        torch.arange(1, 1000) * 2.0**-24,  # subnormal
    ]
    grads = [grad.to(backend.device, torch.float16) for grad in grads]
    assert_exact(gradient_moments(grads), grads)


@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, -1e4, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES[:2] + DTYPES[3:], ids=str)
def test_constant_gradients(backend: Backend, value: float, dtype: torch.dtype) -> None:
    grads = [torch.full((n,), value, device=backend.device, dtype=dtype) for n in (2, 33, 5000)]
    for row, grad in zip(gradient_moments(grads).tolist(), grads, strict=True):
        stored = grad[0].item()
        assert row[1] == pytest.approx(stored, rel=1e-15)
        assert row[2] <= len(grad) * (1e-15 * stored) ** 2


def test_one_element_none_and_empty(backend: Backend) -> None:
    grads = [
        torch.tensor(3.0, device=backend.device),
        None,
        torch.empty(0, 4, device=backend.device),
        torch.tensor([[-2.0]], device=backend.device, dtype=torch.float64),
        torch.empty(0, device=backend.device),
    ]
    expected = [[1, 3, 0], [0, 0, 0], [0, 0, 0], [1, -2, 0], [0, 0, 0]]
    assert gradient_moments(grads).tolist() == expected


def test_nothing_to_measure(backend: Backend) -> None:
    assert gradient_moments([]).shape == (0, 3)
    assert gradient_moments([None, None]).tolist() == [[0.0] * 3] * 2
    empty = torch.empty(0, device=backend.device)
    assert gradient_moments([empty]).tolist() == [[0.0] * 3]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [0, 17, CHUNK - 1, CHUNK, CHUNK + 6])
def test_nonfinite_stays_in_its_tensor(
    backend: Backend, bad: float, dtype: torch.dtype, where: int
) -> None:
    clean = torch.randn(CHUNK + 7).to(backend.device, dtype)
    broken = clean.clone()
    broken[where] = bad
    rows = gradient_moments([clean, broken, clean])
    assert rows[1, 0] == CHUNK + 7
    assert not rows[1, 1].isfinite()
    assert not rows[1, 2].isfinite()
    assert_exact(rows[::2], [clean, clean])


def test_layouts(backend: Backend) -> None:
    base = torch.randn(12, 10, 9, 8, device=backend.device)
    grads = [
        base.to(memory_format=torch.channels_last),
        base.transpose(0, 3),
        base[:, ::2],  # with gaps, as all below
        base.permute(3, 1, 0, 2)[1:, :, 2:5],
        base[..., 0],
        base[0, 0, 0, 0],
    ]
    assert_exact(gradient_moments(grads), grads)


def test_types_may_differ(backend: Backend) -> None:
    grads = [torch.randn(CHUNK + 1).to(backend.device, dtype) for dtype in DTYPES * 2]
    assert_exact(gradient_moments(grads), grads)


def test_more_tensors_than_one_launch_holds(native: Backend) -> None:
    grads = [torch.randn(1 + i % 5, device=native.device) for i in range(800)]
    grads[3] = grads[-1] = torch.empty(0, device=native.device)
    rows = gradient_moments(grads)
    kept = [i for i, grad in enumerate(grads) if grad.numel()]
    assert_exact(rows[kept], [grads[i] for i in kept])
    assert rows[3].tolist() == rows[-1].tolist() == [0.0] * 3


def test_gradients_with_a_graph(backend: Backend) -> None:
    weight = nn.Parameter(torch.randn(5, device=backend.device))
    (grad,) = torch.autograd.grad(weight.pow(3).sum(), weight, create_graph=True)
    rows = gradient_moments([weight, grad])
    assert not rows.requires_grad
    assert_exact(rows, [weight, grad])


def test_gradients_are_not_written(backend: Backend) -> None:
    grads = [torch.randn(CHUNK + 1).to(backend.device, dtype) for dtype in DTYPES]
    before = [grad.clone() for grad in grads]
    gradient_moments(grads)
    assert all(torch.equal(one, other) for one, other in zip(grads, before, strict=True))


def test_same_input_same_bits(backend: Backend) -> None:
    grads = [torch.randn(9 * CHUNK + 1, device=backend.device), torch.randn(77)]
    grads[1] = grads[1].to(backend.device)
    rows = gradient_moments(grads)
    assert all(torch.equal(gradient_moments(grads), rows) for _ in range(5))
    # Nor does it matter what else is in the list, or where in memory a tensor is.
    assert torch.equal(gradient_moments(grads[::-1]), rows.flip(0))
    if not backend.cuda_kernels:  # there heads and tails of a view are other threads' work
        moved = torch.empty(9 * CHUNK + 2, device=backend.device)[1:].copy_(grads[0])
        assert torch.equal(gradient_moments([moved])[0], rows[0])


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(cpu: Backend) -> None:
    """The second half must count, at the right place."""
    count = 2**31 + CHUNK + 3
    grad = torch.zeros(count, dtype=torch.bfloat16)
    grad[2**31 :] = 2.0
    heavy = CHUNK + 3
    (row,) = gradient_moments([grad]).tolist()
    mean = 2 * heavy / count
    assert row == pytest.approx([count, mean, heavy * (2 - mean) ** 2 + 2**31 * mean**2], rel=1e-9)
