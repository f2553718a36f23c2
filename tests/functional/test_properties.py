"""Native code against the reference on lists of tensors that Hypothesis draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmbal_fast import reference
from mmbal_fast.functional import gradient_moments, modulate_, noise_like

if TYPE_CHECKING:
    from tests.conftest import Backend

CHUNK = 4096  # of csrc/math/moments.h
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "view", "channels_last", "transposed", "sliced", "strided rows")


@dataclass(frozen=True)
class Drawn:
    """A gradient to be: hypothesis prints what it shrinks to."""

    size: int
    dtype: torch.dtype
    layout: str
    shift: int
    modality: int
    tensor_id: int
    offset: int
    scale: float
    mean: float

    def make(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return ((values + self.mean) * self.scale).to(self.dtype)

        n = self.size
        if self.layout == "view":
            return random(n + self.shift)[self.shift :]
        if self.layout == "channels_last":
            return random(1 + n // 24, 3, 2, 4).to(memory_format=torch.channels_last)
        if self.layout == "transposed":
            return random(1 + n // 7, 7).t()
        if self.layout == "sliced":
            return random(1 + n // 5, 5 + self.shift)[:, self.shift :]
        if self.layout == "strided rows":
            return random(n, 2)[:, 0]
        return random(n)


sizes = st.one_of(
    st.integers(0, 70),
    st.sampled_from([c * CHUNK + d for c in (1, 2, 3) for d in (-33, -1, 0, 1)]),
    st.integers(0, 3 * CHUNK),
)
gradients = st.builds(
    Drawn,
    size=sizes,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    shift=st.integers(0, 16),
    modality=st.integers(0, 2),
    tensor_id=st.integers(0, 2**32 - 1),
    offset=st.one_of(st.integers(0, 9), st.integers(2**34 - CHUNK, 2**34 + 5)),
    scale=st.sampled_from([1.0, 1e-4, 300.0]),
    mean=st.sampled_from([0.0, 1.0, 100.0]),
)
coefficients = st.sampled_from([1.0, 0.3, 0.0, 1.5, float("nan")])


def assert_same(mine: Tensor, other: Tensor, before: Tensor, amplitude: float) -> None:
    """To one rounding of the type, and to the float32 polynomials of the noise."""
    unit = {torch.float16: 2**-10, torch.bfloat16: 2**-7}.get(mine.dtype, 5e-7)
    unit = 1e-12 if mine.dtype == torch.float64 else unit
    bound = before.abs().max().item() if mine.dtype != torch.float64 and before.numel() else 0.0
    smallest = 2.0**-24 if mine.dtype == torch.float16 else 0.0
    torch.testing.assert_close(
        mine.cpu().double(),
        other.double(),
        rtol=unit,
        atol=2e-6 * amplitude + 2e-7 * bound + smallest,
        equal_nan=True,
    )


@pytest.mark.parametrize("_", [None])  # a mark, so that Hypothesis may run below a fixture
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    drawn=st.lists(st.one_of(st.none(), gradients), max_size=6),
    k=st.lists(coefficients, min_size=3, max_size=3),
    noise=st.sampled_from([0.0, 1.0, 2.5]),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**33),
    step_is_tensor=st.booleans(),
    threads=st.integers(1, 3),
)
def test_native_code_equals_the_reference(
    native: Backend,
    _: None,
    drawn: list[Drawn | None],
    k: list[float],
    noise: float,
    seed: int,
    step: int,
    step_is_tensor: bool,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    before = [None if each is None else each.make(i) for i, each in enumerate(drawn)]
    # Made anew, not cloned: clone would change the layout.
    expected = [None if each is None else each.make(i) for i, each in enumerate(drawn)]
    mine = [None if each is None else each.make(i) for i, each in enumerate(drawn)]
    if native.device.type == "cuda":
        mine = [None if grad is None else like_on(grad, native.device) for grad in mine]
    found = [each for each in drawn if each is not None]

    rows, exact = gradient_moments(mine).cpu(), reference.gradient_moments(before)
    torch.testing.assert_close(rows[:, 0::2], exact[:, 0::2], rtol=1e-5, atol=1e-300)
    spread = (exact[:, 2] / exact[:, 0].clamp(min=1)).sqrt()  # of rounding the pivot, per element
    assert ((rows[:, 1] - exact[:, 1]).abs() <= 1e-6 * spread + 1e-7 * exact[:, 1].abs()).all()

    modality = [0 if each is None else each.modality for each in drawn]
    ids = [0 if each is None else each.tensor_id for each in drawn]
    offsets = [0 if each is None else each.offset for each in drawn]

    def run(operation: object, grads: list[Tensor | None], device: torch.device) -> None:
        operation(  # type: ignore[operator]
            grads,
            torch.tensor(k, device=device),
            modality,
            noise=noise,
            seed=seed,
            step=torch.tensor([step], device=device) if step_is_tensor else step,
            tensor_ids=ids,
            offsets=offsets,
        )

    run(modulate_, mine, native.device)
    run(reference.modulate_, expected, torch.device("cpu"))
    for one, other, old, row in zip(mine, expected, before, rows.tolist(), strict=True):
        if one is None or other is None or old is None:
            assert one is other is old is None
            continue
        std = (row[2] / (row[0] - 1)) ** 0.5 if row[0] > 1 else 0.0
        assert_same(one, other, old, noise * (std + 1e-8))

    for each, old in zip(found, (x for x in before if x is not None), strict=True):
        z = noise_like(
            like_on(old, native.device),
            seed=seed,
            step=step,
            tensor_id=each.tensor_id,
            offset=each.offset,
        )
        other = reference.noise_like(
            old, seed=seed, step=step, tensor_id=each.tensor_id, offset=each.offset
        )
        assert z.stride() == other.stride()
        unit = {torch.float16: 2**-10, torch.bfloat16: 2**-7}.get(old.dtype, 0.0)
        torch.testing.assert_close(z.cpu(), other, rtol=unit, atol=1e-6)


def like_on(tensor: Tensor, device: torch.device) -> Tensor:
    """The same values in the same layout on another device, gaps included."""
    if tensor.device.type == device.type:
        return tensor
    base = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return base.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
