"""The noise is the published generator, and depends on nothing but its arguments."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmbal_fast.reference import _noise, noise_like

KNOWN_ANSWERS = [
    line.split()
    for line in (Path(__file__).parents[1] / "data/philox4x32_kat.txt").read_text().splitlines()
    if not line.startswith("#")
]
SAMPLES = 1_000_000


@pytest.mark.parametrize("answer", KNOWN_ANSWERS, ids=lambda answer: "-".join(answer[:2]))
def test_philox_known_answers(answer: list[str]) -> None:
    rounds, words = int(answer[0]), [int(word, 16) for word in answer[1:]]
    c0, c1, c2, c3 = (torch.tensor([word]) for word in words[:4])
    result = _noise.philox4x32((c0, c1, c2, c3), (words[4], words[5]), rounds)
    assert [int(word) for word in result] == words[6:]


def test_both_numbers_of_rounds_are_known() -> None:
    assert [answer[0] for answer in KNOWN_ANSWERS] == ["7"] * 3 + ["10"] * 3


def element(seed: int, step: int, tensor_id: int, index: int) -> float:
    """The definition for one element, in Python's integers and floats."""
    block, lane = index >> 2, index & 3
    words = [block % 2**32, block >> 32, tensor_id % 2**32, step % 2**32]
    key = [seed % 2**32, (seed >> 32) % 2**32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * words[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * words[2], 2**32)
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    a, b = words[lane & 2], words[lane | 1]
    radius = math.sqrt(-2.0 * math.log((a + 0.5) / 2**32))
    theta = 2.0 * math.pi * (b + 0.5) / 2**32
    return radius * (math.sin(theta) if lane & 1 else math.cos(theta))


@pytest.mark.parametrize("offset", [0, 1, 6, 2**31 - 3, 2**34 - 1, 2**62 + 3])
def test_elements_follow_the_definition(offset: int) -> None:
    seed, step, tensor_id = 0x9ABCDEF012345678, 0xFFFFFFF0, 0xDEADBEEF
    noise = noise_like(
        torch.empty(9), seed=seed, step=step, tensor_id=tensor_id, offset=offset
    ).tolist()
    expected = [element(seed, step, tensor_id, offset + i) for i in range(9)]
    assert noise == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_extreme_words_give_finite_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = torch.tensor([0]), torch.tensor([2**32 - 1])
    monkeypatch.setattr(_noise, "philox4x32", lambda counter, key: (low, low, high, high))
    noise = draw(4).tolist()
    largest, smallest = math.sqrt(66 * math.log(2)), 2.0**-16
    assert noise[0::2] == pytest.approx([largest, smallest], rel=1e-6)
    assert noise[1::2] == pytest.approx(
        [largest * math.pi * 2**-32, -smallest * math.pi * 2**-32], rel=1e-6
    )


def draw(count: int = 64, *, seed: int = 0, step: int | Tensor = 0, tensor_id: int = 0) -> Tensor:
    return noise_like(torch.empty(count), seed=seed, step=step, tensor_id=tensor_id)


def test_every_argument_counts() -> None:
    variants = [
        draw(),
        draw(seed=1),
        draw(seed=2**32),
        draw(seed=2**63),
        draw(step=1),
        draw(tensor_id=1),
        draw(tensor_id=2**31),
        noise_like(torch.empty(64), seed=0, step=0, offset=1),
    ]
    for i, one in enumerate(variants):
        assert all((one != other).any() for other in variants[:i])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_step_as_a_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert torch.equal(draw(step=torch.full(shape, 7, dtype=dtype)), draw(step=7))


def test_step_counts_by_its_low_32_bits() -> None:
    assert torch.equal(draw(step=2**32 + 7), draw(step=7))
    assert torch.equal(draw(step=torch.tensor(-1, dtype=torch.int32)), draw(step=2**32 - 1))


def test_uneven_shards_get_the_same_bits() -> None:
    whole = noise_like(torch.empty(11, 3), seed=5, step=2, tensor_id=9, offset=3)
    start = 0
    for rows in (1, 4, 0, 6):
        shard = noise_like(torch.empty(rows, 3), seed=5, step=2, tensor_id=9, offset=3 + start * 3)
        assert torch.equal(shard, whole[start : start + rows])
        start += rows
    assert start == 11


@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    expected = noise_like(torch.empty(23), seed=5, step=2, offset=1)
    monkeypatch.setattr(_noise, "CHUNK", chunk)
    assert torch.equal(noise_like(torch.empty(23), seed=5, step=2, offset=1), expected)


def test_dense_layouts_count_in_memory_order() -> None:
    flat = draw(2 * 3 * 4 * 5)
    image = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    noise = noise_like(image, seed=0, step=0)
    assert noise.stride() == image.stride()
    assert torch.equal(noise.permute(0, 2, 3, 1).flatten(), flat)

    transposed = noise_like(torch.empty(10, 12).t(), seed=0, step=0)
    assert transposed.stride() == (1, 12)
    assert torch.equal(transposed.t().flatten(), flat)


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(6, 8)[:, ::2], torch.empty(8, 6).t()[:, ::2], torch.empty(6, 1).expand(6, 4)],
    ids=["sliced", "transposed and sliced", "expanded"],
)
def test_layouts_with_gaps_count_in_logical_order(tensor: Tensor) -> None:
    assert torch.equal(noise_like(tensor, seed=0, step=0).flatten(), draw(24))


def test_strides_of_dimensions_of_size_one_do_not_matter() -> None:
    transposed = torch.empty(6).as_strided((1, 3, 1, 2), (77, 1, 5, 3))
    noise = noise_like(transposed, seed=0, step=0)
    assert torch.equal(noise.transpose(1, 3).flatten(), draw(6))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_tiny_shapes(shape: tuple[int, ...]) -> None:
    noise = noise_like(torch.empty(shape), seed=0, step=0)
    assert torch.equal(noise.flatten(), draw(noise.numel()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_round_the_same_float32(dtype: torch.dtype) -> None:
    noise = noise_like(torch.empty(64, dtype=dtype), seed=0, step=0)
    assert noise.dtype == dtype
    assert torch.equal(noise, draw().to(dtype))


def test_torch_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    draw()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 20240229])
def test_distribution(seed: int) -> None:
    noise = draw(SAMPLES, seed=seed).double()
    # Four standard errors each; the seeds are fixed, so this passes or fails for good.
    assert abs(noise.mean().item()) < 4 / SAMPLES**0.5
    assert abs(noise.square().mean().item() - 1) < 4 * (2 / SAMPLES) ** 0.5
    assert abs(noise.pow(3).mean().item()) < 4 * (15 / SAMPLES) ** 0.5
    assert abs(noise.pow(4).mean().item() - 3) < 4 * (96 / SAMPLES) ** 0.5
    assert 4.3 < noise.abs().max().item() < 6.0

    cdf = 0.5 * torch.erfc(-noise.sort().values / 2**0.5)
    empirical = torch.arange(SAMPLES, dtype=torch.float64) / SAMPLES
    distance = max((cdf - empirical).max().item(), (empirical + 1 / SAMPLES - cdf).max().item())
    assert distance < 1.63 / SAMPLES**0.5  # Kolmogorov-Smirnov, 1 %


def test_neighbours_are_uncorrelated() -> None:
    count = SAMPLES // 4
    noise = draw(count)
    pairs = [(noise[:-lag], noise[lag:]) for lag in range(1, 9)]
    pairs += [(noise, draw(count, step=1)), (noise, draw(count, tensor_id=1))]
    pairs += [(noise, draw(count, seed=1))]
    for one, other in pairs:
        assert abs((one * other).double().mean().item()) < 4 / count**0.5
        assert abs((one.abs() * other.abs()).double().mean().item() - 2 / math.pi) < 4 / count**0.5
