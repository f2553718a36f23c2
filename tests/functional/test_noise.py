"""The noise is the published generator, and depends on nothing but its arguments."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from scipy import special, stats
from torch import Tensor

from mmbal_fast import _backend, reference
from mmbal_fast.functional import noise_like

if TYPE_CHECKING:
    from tests.conftest import Backend

KNOWN_ANSWERS = [
    line.split()
    for line in (Path(__file__).parents[1] / "data/philox4x32_kat.txt").read_text().splitlines()
    if not line.startswith("#")
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CHUNK = 4096  # of csrc/math/moments.h


def draw(
    count: int,
    backend: Backend,
    *,
    seed: int = 0,
    step: int | Tensor = 0,
    tensor_id: int = 0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    like = torch.empty(count, dtype=dtype, device=backend.device)
    return noise_like(like, seed=seed, step=step, tensor_id=tensor_id, offset=offset).cpu()


# --- the generator


@pytest.mark.parametrize("answer", KNOWN_ANSWERS, ids=lambda answer: "-".join(answer[:2]))
def test_philox_known_answers(native: Backend, answer: list[str]) -> None:
    assert native.native is not None
    rounds, words = int(answer[0]), [int(word, 16) for word in answer[1:]]
    result = native.native.philox4x32(words[:4], words[4:6], rounds, native.cuda_kernels)
    assert result == words[6:]


def test_both_numbers_of_rounds_are_known() -> None:
    assert [answer[0] for answer in KNOWN_ANSWERS] == ["7"] * 3 + ["10"] * 3


# Around element 2^34 the low word of the block counter wraps; with 300 elements the carry falls
# into every lane of every vector width.
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 2**31 - 7, 2**34 - 150, 2**34 - 149, 2**63 - 301])
def test_normals_follow_the_definition(native: Backend, offset: int) -> None:
    key = {"seed": 0x9ABCDEF012345678, "step": 0xFFFFFFF0, "tensor_id": 0xDEADBEEF}
    noise = noise_like(torch.empty(300, device=native.device), offset=offset, **key).cpu()
    expected = reference.noise_like(torch.empty(300), offset=offset, **key)
    # float32 polynomials against float64 rounded once.
    torch.testing.assert_close(noise, expected, rtol=0, atol=6e-7)


def test_blocks_beyond_32_bits_are_new_ones(backend: Backend) -> None:
    low = draw(64, backend)
    assert (draw(64, backend, offset=2**34) != low).all()
    across = draw(64, backend, offset=2**34 - 32)
    assert torch.equal(across[32:], draw(32, backend, offset=2**34))
    assert torch.equal(across[:32], draw(32, backend, offset=2**34 - 32))


def test_every_argument_counts(backend: Backend) -> None:
    variants = [
        draw(64, backend),
        draw(64, backend, seed=1),
        draw(64, backend, seed=2**32),
        draw(64, backend, seed=2**63),
        draw(64, backend, step=1),
        draw(64, backend, step=2**31),
        draw(64, backend, tensor_id=1),
        draw(64, backend, tensor_id=2**31),
        draw(64, backend, offset=1),
        draw(64, backend, offset=4),
    ]
    for one, other in itertools.combinations(variants, 2):
        assert (one != other).all()


def test_step_counts_by_its_low_32_bits(backend: Backend) -> None:
    expected = draw(9, backend, step=7)
    for step in (2**32 + 7, 7 - 2**32):
        assert torch.equal(draw(9, backend, step=step), expected)


def test_step_as_a_tensor(backend: Backend) -> None:
    for step in (7, 2**32 + 7, -1):
        counter = torch.tensor([step], device=backend.device)
        assert torch.equal(draw(9, backend, step=counter), draw(9, backend, step=step))
        assert counter.item() == step


def test_generators_of_torch_are_left_alone(backend: Backend) -> None:
    before = torch.get_rng_state()
    draw(100, backend)
    assert torch.equal(torch.get_rng_state(), before)


# --- the same bits, however the work is cut; instruction sets and threads: test_same_bits.py


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_element_at_a_time(native: Backend, dtype: torch.dtype) -> None:
    """Vector loops against the tail's, at every position of a group."""
    whole = draw(70, native, dtype=dtype, offset=1)
    single = [draw(1, native, dtype=dtype, offset=1 + i) for i in range(70)]
    assert torch.equal(torch.cat(single), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uneven_shards(backend: Backend, dtype: torch.dtype) -> None:
    """Cut on dimension 0, at odd elements and across chunks."""
    key = {"seed": 5, "step": 2, "tensor_id": 9}
    whole = noise_like(torch.empty(2111, 5, dtype=dtype, device=backend.device), offset=3, **key)
    start = 0
    for rows in (1, 2, 0, 13, 900, 1195):
        shard = torch.empty(rows, 5, dtype=dtype, device=backend.device)
        piece = noise_like(shard, offset=3 + 5 * start, **key)
        assert torch.equal(piece, whole[start : start + rows])
        start += rows
    assert start == len(whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 2**34 - 4096])
def test_all_native_code_gives_the_same_bits(
    native: Backend, cpu: Backend, dtype: torch.dtype, offset: int
) -> None:
    count = 3 * CHUNK + 5
    noise = draw(count, native, seed=11, step=12, tensor_id=13, offset=offset, dtype=dtype)
    with _backend.using(cpu.native):
        expected = draw(count, cpu, seed=11, step=12, tensor_id=13, offset=offset, dtype=dtype)
    assert torch.equal(noise, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_round_the_same_float32(backend: Backend, dtype: torch.dtype) -> None:
    noise = draw(100, backend, dtype=dtype)
    assert noise.dtype == dtype
    assert torch.equal(noise, draw(100, backend).to(dtype))


# --- layouts


def test_dense_layouts_count_in_memory_order(backend: Backend) -> None:
    flat = draw(120, backend)
    image = torch.empty(2, 3, 4, 5, device=backend.device).to(memory_format=torch.channels_last)
    noise = noise_like(image, seed=0, step=0)
    assert noise.stride() == image.stride()
    assert torch.equal(noise.permute(0, 2, 3, 1).flatten().cpu(), flat)

    transposed = noise_like(torch.empty(10, 12, device=backend.device).t(), seed=0, step=0)
    assert transposed.stride() == (1, 12)
    assert torch.equal(transposed.t().flatten().cpu(), flat)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(6, 8)[:, ::2],
        torch.empty(8, 6).t()[:, ::2],
        torch.empty(4, 8, 6).permute(2, 0, 1)[:, :2, ::4],
        torch.empty(6, 1).expand(6, 4),
    ],
    ids=["sliced", "transposed and sliced", "permuted and sliced", "expanded"],
)
def test_layouts_with_gaps_count_in_logical_order(backend: Backend, tensor: Tensor) -> None:
    noise = noise_like(tensor.to(backend.device), seed=0, step=0)
    assert torch.equal(noise.flatten().cpu(), draw(tensor.numel(), backend))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_tiny_shapes(backend: Backend, shape: tuple[int, ...]) -> None:
    noise = noise_like(torch.empty(shape, device=backend.device), seed=0, step=0)
    assert noise.shape == shape
    assert torch.equal(noise.flatten().cpu(), draw(noise.numel(), backend))


def test_noise_has_no_graph(backend: Backend) -> None:
    weight = torch.nn.Parameter(torch.zeros(3, device=backend.device))
    assert not noise_like(weight, seed=0, step=0).requires_grad


# --- statistics. All native code gives the same bits, so one backend stands for all; the seeds are
# fixed, so these pass or fail for good. Limits are four standard errors.

SAMPLES = 10_000_000


def p_value(noise: Tensor) -> float:
    """Of the Kolmogorov-Smirnov test against the standard normal distribution."""
    count = len(noise)
    cdf = special.ndtr(noise.sort().values.double().numpy())
    below = torch.arange(count, dtype=torch.float64).numpy() / count
    distance = max((cdf - below).max(), (below + 1 / count - cdf).max())
    return float(stats.kstwobign.sf(distance * count**0.5))


@pytest.mark.parametrize("seed", [0, 20240229])
def test_distribution(cpu: Backend, seed: int) -> None:
    noise = draw(SAMPLES, cpu, seed=seed, step=3, tensor_id=seed % 97)
    exact = noise.double()
    squares = exact * exact
    assert abs(exact.mean().item()) < 4 / SAMPLES**0.5
    assert abs(squares.mean().item() - 1) < 4 * (2 / SAMPLES) ** 0.5
    assert abs(exact.dot(squares).item() / SAMPLES) < 4 * (15 / SAMPLES) ** 0.5
    assert abs(squares.dot(squares).item() / SAMPLES - 3) < 4 * (96 / SAMPLES) ** 0.5
    # Of so many normals the largest is 5.3 on average; 6.8 is the most that 32 bits can give.
    assert 4.8 < noise.abs().max().item() < 6.2
    assert p_value(noise) > 0.01


@pytest.mark.parametrize("lane", range(4))
def test_distribution_of_each_lane(cpu: Backend, lane: int) -> None:
    noise = draw(4_000_000, cpu, seed=1)[lane::4]
    assert abs(noise.double().mean().item()) < 4 / 1000
    assert abs(noise.double().square().mean().item() - 1) < 4 * 2**0.5 / 1000
    assert p_value(noise) > 0.01


def assert_uncorrelated(one: Tensor, other: Tensor) -> None:
    limit = 4 / one.numel() ** 0.5
    assert abs((one * other).double().mean().item()) < limit
    both = (one.square() - 1) * (other.square() - 1) / 2
    assert abs(both.double().mean().item()) < 2 * limit  # heavier tails than a product of normals
    assert abs((one.abs() * other.abs()).double().mean().item() - 2 / math.pi) < limit


def test_lanes_are_uncorrelated(cpu: Backend) -> None:
    blocks = draw(SAMPLES, cpu, seed=2).view(-1, 4)
    for one, other in itertools.combinations(blocks.unbind(dim=1), 2):
        assert_uncorrelated(one, other)


def test_neighbours_are_uncorrelated(cpu: Backend) -> None:
    noise = draw(2_000_000, cpu, seed=2)
    for lag in (1, 2, 3, 4, 8, 16, 64, CHUNK):
        assert_uncorrelated(noise[:-lag], noise[lag:])


@pytest.mark.parametrize("other", [{"step": 1}, {"tensor_id": 1}, {"seed": 1}, {"offset": 2**34}])
def test_streams_are_uncorrelated(cpu: Backend, other: dict[str, int]) -> None:
    assert_uncorrelated(
        draw(2_000_000, cpu),
        draw(2_000_000, cpu, **other),  # type: ignore[arg-type]
    )


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"seed": 2**64},
            r"^noise_like: seed must be from 0 to 2\^64 - 1 \(got 18446744073709551616\)$",
        ),
        ({"seed": -1}, r"^noise_like: seed must be from 0 to 2\^64 - 1 \(got -1\)$"),
        ({"tensor_id": 2**32}, r"^noise_like: tensor_id must be from 0 to \d+ \(got 4294967296\)$"),
        ({"tensor_id": -1}, r"^noise_like: tensor_id must be from 0 to 4294967295 \(got -1\)$"),
        ({"offset": -4}, r"^noise_like: offset must be from 0 to \d+ \(got -4\)$"),
        (
            {"offset": 2**63 - 3},
            r"^noise_like: offset must leave room for 4 elements below 2\^63 \(got \d+\)$",
        ),
        (
            {"step": 2**63},
            r"^noise_like: step must be from -\d+ to \d+ \(got 9223372036854775808\)$",
        ),
    ],
)
def test_numbers_out_of_range(backend: Backend, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(4, backend, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_other_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"^noise_like: tensor must be float32.*\(got {dtype}\)$"):
        draw(4, backend, dtype=dtype)
