"""The in-place update against its formula, element for element."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from mmbal_fast import _backend
from mmbal_fast.functional import gradient_moments, modulate_, noise_like
from mmbal_fast.functional._modulate import update_

if TYPE_CHECKING:
    from tests.conftest import Backend

pytestmark = pytest.mark.in_one_launch

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CHUNK = 4096  # of csrc/math/moments.h
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1023, 1025]
SIZES += [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 61]


def gradients(sizes: list[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.randn(size).to(device, dtype) for size in sizes]


def clones(grads: list[Tensor]) -> list[Tensor]:
    return [grad.clone() for grad in grads]


def factors(device: torch.device, *values: float) -> Tensor:
    return torch.tensor(values, device=device)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Bit for bit, NaN included."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        torch.equal(x.view(integers[x.element_size()]), y.view(integers[y.element_size()]))
        for x, y in zip(one, other, strict=True)
    )


def scaled(grad: Tensor, k: float) -> Tensor:
    """``k * g`` with one rounding from the type that is computed in."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    result = grad.to(wide) * torch.tensor(k, dtype=torch.float32, device=grad.device).to(wide)
    return result.to(grad.dtype)


# --- without noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [0.3, 0.0, -1.7, 1.0])
def test_without_noise_exactly_scaled(backend: Backend, dtype: torch.dtype, k: float) -> None:
    grads = gradients(SIZES, dtype, backend.device)
    expected = [scaled(grad, k) for grad in grads]
    modulate_(grads, factors(backend.device, 5.0, k), [1] * len(grads), noise=0.0)
    assert same(grads, expected)


def surrounded(backend: Backend, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Views at every alignment, and the memory that they are cut from with gaps between them."""
    shifts = range(17) if backend.native else range(3)
    spans, end = [], 0
    for shift in shifts:
        for size in (1, 7, 130, CHUNK + 3):
            start = end + 32 - end % 16 + shift
            end = start + size
            spans.append((start, end))
    flat = torch.randn(end + 64).to(backend.device, dtype)
    return flat, [flat[start:end] for start, end in spans]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_only_the_gradient_is_written(backend: Backend, dtype: torch.dtype, noise: float) -> None:
    flat, views = surrounded(backend, dtype)
    before = flat.clone()
    inside = torch.zeros_like(flat, dtype=torch.bool)
    for view in views:
        inside[view.storage_offset() :][: len(view)] = True
    modulate_(views, factors(backend.device, -0.5), [0] * len(views), noise=noise)
    assert torch.equal(flat[~inside], before[~inside])
    assert (flat[inside] != before[inside]).float().mean() > 0.99
    if noise == 0:
        assert torch.equal(flat[inside], scaled(before[inside], -0.5))


def test_each_gradient_takes_the_coefficient_of_its_modality(backend: Backend) -> None:
    grads = [torch.ones(3, device=backend.device) for _ in range(5)]
    modulate_(grads, factors(backend.device, 2.0, 3.0, 5.0), [2, 0, 1, 1, 0], noise=0.0)
    assert [grad.tolist() for grad in grads] == [[k] * 3 for k in (5.0, 2.0, 3.0, 3.0, 2.0)]


# --- with noise


def assert_formula(
    result: Tensor, grad: Tensor, z: Tensor, *, k: float, noise: float = 1.0, eps: float = 1e-8
) -> None:
    """``k g + noise (std + eps) z`` in float64, to the precision of the type."""
    exact = grad.double()
    std = exact.std().item() if grad.numel() > 1 else 0.0
    expected = k * exact + noise * (std + eps) * z.double()
    unit = {torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(grad.dtype, 1e-6)
    torch.testing.assert_close(result.double(), expected, rtol=unit, atol=2e-6 * (std + eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_of_the_standard_deviation_is_added(backend: Backend, dtype: torch.dtype) -> None:
    grads = gradients(SIZES, dtype, backend.device)
    before = clones(grads)
    ids = [7 * i for i in range(len(grads))]
    modulate_(
        grads, factors(backend.device, 0.25), [0] * len(grads), seed=3, step=4, tensor_ids=ids
    )
    for grad, old, name in zip(grads, before, ids, strict=True):
        # float64 gradients get the same normals: not rounded, but not wider either.
        z = noise_like(old.float(), seed=3, step=4, tensor_id=name)
        assert_formula(grad, old, z, k=0.25)


def test_residual_has_the_deviation_of_the_unscaled_gradient(native: Backend) -> None:
    """Measured, not computed: this must hold whatever the noise is made of."""
    count = 60_000 if native.emulated else 1_000_000
    grads = [torch.randn(count, device=native.device) * scale + 0.7 for scale in (0.01, 1.0, 300)]
    before = clones(grads)
    modulate_(grads, factors(native.device, 0.3, 1.0), [0, 1, 0], seed=5)
    residuals = [
        ((new - k * old) / old.std()).double()
        for new, old, k in zip(grads, before, (0.3, 1.0, 0.3), strict=True)
    ]
    for residual, old in zip(residuals, before, strict=True):
        assert abs(residual.mean().item()) < 4 / count**0.5
        assert abs(residual.std().item() - 1) < 4 / (2 * count) ** 0.5
        deviation = (old - old.mean()) / old.std()
        assert abs((residual * deviation).mean().item()) < 4 / count**0.5
    assert abs((residuals[0] * residuals[1]).mean().item()) < 4 / count**0.5
    assert abs((residuals[1] * residuals[2]).mean().item()) < 4 / count**0.5


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 0.1])
def test_factor_and_epsilon(backend: Backend, noise: float, eps: float) -> None:
    grad, constant = torch.randn(50, device=backend.device), torch.ones(9, device=backend.device)
    before = grad.clone()
    modulate_([grad, constant], factors(backend.device, 0.5), [0, 0], noise=noise, eps=eps)
    z = noise_like(grad, seed=0, step=0, tensor_id=0)
    assert_formula(grad, before, z, k=0.5, noise=noise, eps=eps)
    z = noise_like(constant, seed=0, step=0, tensor_id=1)
    torch.testing.assert_close(constant, 0.5 + noise * eps * z, rtol=1e-6, atol=0)


def test_zeros_get_noise_of_epsilon(backend: Backend) -> None:
    grad = torch.zeros(5, device=backend.device)
    modulate_([grad], factors(backend.device, 1.0), [0])
    z = noise_like(grad, seed=0, step=0)
    torch.testing.assert_close(grad, 1e-8 * z, rtol=1e-6, atol=0)


def test_one_element_has_no_deviation(backend: Backend) -> None:
    grad = torch.tensor(3.0, device=backend.device)
    modulate_([grad], factors(backend.device, 0.5), [0], eps=0.0)
    assert grad.item() == 1.5
    modulate_([grad], factors(backend.device, 1.0), [0], eps=0.25)
    z = noise_like(grad, seed=0, step=0)
    assert grad.item() == pytest.approx(1.5 + 0.25 * z.item(), rel=1e-6)


def test_ids_are_positions_by_default(backend: Backend) -> None:
    """Counted with what is skipped: a frozen layer must not shift the others' noise."""
    some = [torch.ones(3, device=backend.device), None, torch.empty(0, device=backend.device)]
    grads = [*some, torch.randn(5, device=backend.device)]
    twin = [torch.randn(5).to(backend.device).copy_(grads[3])]  # type: ignore[arg-type]
    modulate_(grads, factors(backend.device, 1.0), [0] * 4)
    modulate_(twin, factors(backend.device, 1.0), [0], tensor_ids=[3])
    assert torch.equal(grads[3], twin[0])  # type: ignore[arg-type]


def test_step_as_a_tensor(backend: Backend) -> None:
    grads = gradients([9, 9], torch.float32, backend.device)
    grads[1].copy_(grads[0])
    counter = torch.tensor([6], device=backend.device)
    modulate_(grads[:1], factors(backend.device, 1.0), [0], step=6)
    modulate_(grads[1:], factors(backend.device, 1.0), [0], step=counter)
    assert torch.equal(grads[0], grads[1])
    assert counter.item() == 6


def test_large_values_do_not_overflow_the_noise(backend: Backend) -> None:
    grad = torch.randn(100, device=backend.device) * 1e30
    before = grad.clone()
    modulate_([grad], factors(backend.device, 0.5), [0])
    assert_formula(grad, before, noise_like(grad, seed=0, step=0), k=0.5)


# --- moments that the caller gives, and shards


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_moments_make_all_native_code_agree(
    native: Backend, cpu: Backend, dtype: torch.dtype
) -> None:
    """Sums are ordered as suits the hardware; everything after them is the same to the bit."""
    grads = gradients([1, 37, CHUNK + 5, 999], dtype, cpu.device)
    grads.append(torch.randn(6, 5, 4, 3).to(dtype).to(memory_format=torch.channels_last))
    k, modality = torch.tensor([0.3, 1.0]), [0, 1, 0, 1, 0]
    numbers = {"seed": 7, "step": 8, "offsets": [0, 1, 2, 3, 4], "tensor_ids": [5, 9, 1, 2**31, 8]}
    mine = [grad.to(native.device) for grad in grads]
    with _backend.using(cpu.native):
        moments = gradient_moments(grads)
        modulate_(grads, k, modality, moments=moments, **numbers)  # type: ignore[arg-type]
    moments, k = moments.to(native.device), k.to(native.device)
    modulate_(mine, k, modality, moments=moments, **numbers)  # type: ignore[arg-type]
    for one, other in zip(mine, grads, strict=True):
        assert one.stride() == other.stride()
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_update_to_the_whole(backend: Backend, dtype: torch.dtype) -> None:
    """Uneven cuts on dimension 0, as FSDP makes them, over groups and chunks."""
    whole = torch.randn(1031, 7).to(backend.device, dtype)
    moments = gradient_moments([whole])
    rows = [1, 0, 2, 600, 428]
    shards = [shard.clone() for shard in whole.split(rows)]
    k = factors(backend.device, 0.4)
    modulate_([whole], k, [0], seed=1, step=2, tensor_ids=[3], moments=moments)
    start = 0
    for shard in shards:
        modulate_(
            [shard], k, [0], seed=1, step=2, tensor_ids=[3], offsets=[7 * start], moments=moments
        )
        start += len(shard)
    assert torch.equal(torch.cat(shards), whole)


def test_given_moments_are_used(backend: Backend) -> None:
    grad = torch.zeros(6, device=backend.device)
    moments = torch.tensor([[101.0, 0.0, 400.0]], dtype=torch.float64, device=backend.device)
    modulate_([grad], factors(backend.device, 1.0), [0], moments=moments, eps=0.0)
    torch.testing.assert_close(grad, 2 * noise_like(grad, seed=0, step=0), rtol=1e-6, atol=0)


# --- unscaling in the same pass


def assert_as_if_unscaled_before(
    native: Backend,
    grads: list[Tensor],
    inverse: float,
    *,
    noise: float = 1.0,
    moments: Tensor | None = None,
) -> None:
    """Bit for bit the update of gradients that were unscaled in memory, and what is reported."""
    separate, found = copy.deepcopy(grads), False  # at the same offsets of their storages
    for grad in separate:
        found |= not bool(grad.isfinite().all())
        largest = torch.finfo(grad.dtype).max
        result = scaled(grad, inverse)
        if grad.dtype == torch.float16:  # saturates, as everywhere
            result = torch.where(grad.isfinite(), result.clamp(-largest, largest), result)
        grad.copy_(result)
    statuses = torch.zeros(2, 1, dtype=torch.int32, device=native.device)
    counters = torch.full((2, 1), 5, device=native.device)
    found_inf = torch.zeros((), device=native.device)
    given: dict[str, Any] = {
        "coefficients": factors(native.device, 1.0, 0.5),
        "modality": [i % 2 for i in range(len(grads))],
        "noise": noise,
        "moments": moments,
        "advance": True,
    }
    update_(separate, step=counters[0], status=statuses[0], **given)
    update_(
        grads,
        step=counters[1],
        status=statuses[1],
        inverse_scale=factors(native.device, inverse)[0],
        found_inf=found_inf,
        **given,
    )
    for one, other in zip(grads, separate, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert found_inf.item() == found
    assert statuses[0].item() == statuses[1].item()
    assert counters.tolist() == [[6], [6]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("inverse", [2.0**-10, 0.3, 1.0, 3.0])
def test_unscaled_in_the_same_pass(
    native: Backend, dtype: torch.dtype, noise: float, inverse: float
) -> None:
    grads = gradients(SIZES, dtype, native.device)
    grads += [torch.zeros(40).to(grads[0]), torch.randn(6, 5, 4, 3).to(grads[0]).transpose(0, 2)]
    grads += [torch.randn(12, 12).to(grads[0])[:, ::2]]
    assert_as_if_unscaled_before(native, grads, inverse, noise=noise)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_only_the_gradient_is_unscaled(native: Backend, dtype: torch.dtype, noise: float) -> None:
    flat, views = surrounded(native, dtype)
    before, inside = flat.clone(), torch.zeros_like(flat, dtype=torch.bool)
    for view in views:
        inside[view.storage_offset() :][: len(view)] = True
    assert_as_if_unscaled_before(native, views, 0.3, noise=noise)
    assert torch.equal(flat[~inside], before[~inside])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_unscaling_finds_what_is_not_finite(
    native: Backend, dtype: torch.dtype, noise: float, bad: float
) -> None:
    for where in (0, 17, 64, CHUNK // 2, CHUNK, CHUNK + 4):
        for spoiled in range(2):
            grads = gradients([CHUNK + 5, CHUNK + 5], dtype, native.device)
            grads[spoiled][where] = bad
            moments = torch.tensor([[9.0, 0.0, 4.0]] * 2, dtype=torch.float64, device=native.device)
            assert_as_if_unscaled_before(native, clones(grads), 0.5, noise=noise)
            assert_as_if_unscaled_before(native, grads, 0.5, noise=noise, moments=moments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_unscaling_that_overflows_is_not_found(
    native: Backend, dtype: torch.dtype, noise: float
) -> None:
    """The gradient was finite, so the scaler steps, as it does after its own unscaling."""
    grads = gradients([50, CHUNK + 9], dtype, native.device)
    grads[1][[7, CHUNK + 3]] = torch.finfo(dtype).max / 2
    assert_as_if_unscaled_before(native, grads, 4.0, noise=noise)
    assert grads[1].isfinite().all() == (dtype == torch.float16)


@pytest.mark.parametrize("count", [97, 800])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_unscaling_more_tensors_than_one_launch_holds(
    native: Backend, count: int, noise: float
) -> None:
    grads = [torch.randn(1 + i % 5, device=native.device) for i in range(count)]
    grads[-1][0] = INF
    assert_as_if_unscaled_before(native, grads, 0.3, noise=noise)


def test_a_tensor_listed_twice_is_unscaled_once(native: Backend) -> None:
    dense, sliced = torch.randn(50, device=native.device), torch.randn(9, 8, device=native.device)
    for grad in (dense, sliced[:, ::3]):
        twin, expected = grad.clone(), 0.25 * grad
        inverse = factors(native.device, 0.25)[0]
        update_(
            [twin, twin],
            factors(native.device, 1.0),
            [0, 0],
            noise=0.0,
            inverse_scale=inverse,
            found_inf=torch.zeros_like(inverse),
        )
        assert torch.equal(twin, expected)


# --- lists and layouts


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_layouts(backend: Backend, noise: float) -> None:
    base = torch.randn(6, 10, 9, 8, device=backend.device)
    views = {
        "channels_last": base.clone().to(memory_format=torch.channels_last),
        "transposed": base.clone().transpose(0, 3),
        "sliced": base.clone()[:, ::2],
        "permuted and sliced": base.clone().permute(3, 1, 0, 2)[1:, :, 2:5],
        "column": base.clone()[..., 0],
        "odd strides": torch.randn(500, device=backend.device).as_strided((3, 1, 40), (150, 9, 3)),
    }
    for number, view in enumerate(views.values()):
        before = view.clone()
        address, strides = view.data_ptr(), view.stride()
        modulate_([view], factors(backend.device, 0.5), [0], noise=noise, tensor_ids=[number])
        assert (view.data_ptr(), view.stride()) == (address, strides)
        z = noise_like(view, seed=0, step=0, tensor_id=number)
        assert_formula(view, before, z, k=0.5, noise=noise)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_gaps_are_not_written(backend: Backend, noise: float) -> None:
    base = torch.randn(6, 8, device=backend.device)
    before = base.clone()
    modulate_([base[:, ::2]], factors(backend.device, 0.5), [0], noise=noise)
    assert torch.equal(base[:, 1::2], before[:, 1::2])
    assert (base[:, ::2] != before[:, ::2]).all()


def test_types_and_layouts_may_differ(backend: Backend) -> None:
    shapes = [(3, 4), (70, 60), (5,), (2, 2)]
    grads = [torch.randn(s).to(backend.device, d) for s, d in zip(shapes, DTYPES, strict=True)]
    grads += [torch.randn(5, 6, device=backend.device).t()[1:, ::2]]
    before = clones(grads)
    modulate_(grads, factors(backend.device, 0.5, 1.0), [0, 1, 0, 1, 0])
    for i, (grad, old) in enumerate(zip(grads, before, strict=True)):
        z = noise_like(grad, seed=0, step=0, tensor_id=i).float()
        if grad.dtype in (torch.float16, torch.bfloat16):
            z = noise_like(old.float(), seed=0, step=0, tensor_id=i)
        assert_formula(grad, old, z, k=[0.5, 1.0][i % 2])


def test_more_tensors_than_one_launch_holds(native: Backend) -> None:
    grads = [torch.randn(1 + i % 5, device=native.device) for i in range(800)]
    before = clones(grads)
    counter = torch.tensor([3], device=native.device)
    modulate_(grads, factors(native.device, 0.5), [0] * 800, step=counter)
    for i in range(0, 800, 9):
        z = noise_like(grads[i], seed=0, step=3, tensor_id=i)
        assert_formula(grads[i], before[i], z, k=0.5)


def test_a_tensor_listed_twice_is_updated_once(backend: Backend) -> None:
    dense, sliced = torch.randn(50, device=backend.device), torch.randn(9, 8, device=backend.device)
    for grad in (dense, sliced[:, ::3]):
        alone = grad.clone()
        modulate_([grad, grad, grad], factors(backend.device, 0.5), [0, 0, 0])
        modulate_([alone], factors(backend.device, 0.5), [0])
        assert torch.equal(grad, alone)


def test_nothing_to_do(backend: Backend) -> None:
    k = factors(backend.device, 0.5)
    modulate_([], k, [])
    modulate_([None, torch.empty(0, 3, device=backend.device)], k, [0, 0])


def test_gradients_in_a_graph(backend: Backend) -> None:
    weight = nn.Parameter(torch.randn(3, 3, device=backend.device))
    (grad,) = torch.autograd.grad(weight.pow(3).sum(), weight, create_graph=True)
    expected = 0.5 * grad.detach()
    k = factors(backend.device, 0.5).requires_grad_()
    modulate_([grad], k, [0], noise=0.0)
    assert torch.equal(grad, expected)


def test_generators_of_torch_are_left_alone(backend: Backend) -> None:
    grad = torch.randn(5, device=backend.device)
    before = torch.get_rng_state()
    modulate_([grad], factors(backend.device, 0.5), [0])
    assert torch.equal(torch.get_rng_state(), before)


# --- values that are not numbers


@pytest.mark.parametrize("size", [1, 3, CHUNK + 40])
def test_large_numbers_are_numbers(backend: Backend, size: int) -> None:
    """Also where their squares are too large for float64; then there is no noise."""
    large = torch.linspace(-1e160, 3e160, size, dtype=torch.float64).to(backend.device)
    expected, k = scaled(large, 0.5), factors(backend.device, 0.5)
    status = torch.zeros(1, dtype=torch.int32, device=backend.device)
    modulate_([large], k, [0], status=status, error_if_nonfinite=True)
    assert torch.equal(large, expected)
    assert status.item() == 0
    large[-1] = INF
    with pytest.raises(RuntimeError, match="gradients must be finite"):
        modulate_([large], k, [0], error_if_nonfinite=True)
    modulate_([large], k, [0], status=status)
    assert status.item() == 1


@pytest.mark.parametrize("size", [1.0, 1e60])
def test_noise_of_float64_is_a_float64_product(backend: Backend, size: float) -> None:
    grad = size * torch.randn(100, dtype=torch.float64).to(backend.device)
    normal = noise_like(grad.float(), seed=3, step=4).double()
    expected = 0.5 * grad + (grad.std() + 1e-8) * normal
    modulate_([grad], factors(backend.device, 0.5), [0], seed=3, step=4)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14 * size)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [0.5, 1.0])
def test_nonfinite_gradient_is_only_scaled(
    backend: Backend, bad: float, dtype: torch.dtype, k: float
) -> None:
    broken = torch.randn(CHUNK + 40).to(backend.device, dtype)
    broken[[0, 33, CHUNK + 39]] = bad
    clean = torch.randn(50).to(backend.device, dtype)
    twin, expected = clean.clone(), scaled(broken, k)
    status = torch.zeros(1, dtype=torch.int32, device=backend.device)
    modulate_([broken, clean], factors(backend.device, k), [0, 0], status=status)
    assert torch.equal(broken.isnan(), expected.isnan())
    assert torch.equal(broken.nan_to_num(), expected.nan_to_num())
    assert status.item() == 1
    modulate_([twin], factors(backend.device, k), [0], tensor_ids=[1])
    assert same([clean], [twin])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("k", [0.5, 1.0])
def test_status_is_set_by_nonfinite_gradients_alone(
    backend: Backend, dtype: torch.dtype, noise: float, k: float
) -> None:
    for where in (None, 0, 17, 64, CHUNK, CHUNK + 4):
        grad = torch.randn(CHUNK + 5).to(backend.device, dtype)
        if where is not None:
            grad[where] = INF
        status = torch.tensor([4], dtype=torch.int32, device=backend.device)
        modulate_([grad], factors(backend.device, k), [0], noise=noise, status=status)
        assert status.item() == (4 if where is None else 5)


def test_error_if_nonfinite(backend: Backend) -> None:
    grads = [torch.ones(3), torch.ones(2), torch.tensor([1.0, NAN]), torch.tensor([INF])]
    grads = [grad.to(backend.device) for grad in grads]
    before = clones(grads)
    k = factors(backend.device, 0.5)
    with pytest.raises(
        RuntimeError,
        match=r"^modulate_: gradients must be finite "
        r"\(got NaN or inf in gradient grads\[2\], gradient grads\[3\]\)$",
    ):
        modulate_(grads, k, [0] * 4, error_if_nonfinite=True)
    assert same(grads, before)
    modulate_(grads[:2], k, [0, 0], noise=0.0, error_if_nonfinite=True)
    assert grads[0].tolist() == [0.5] * 3


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_undefined_coefficient_throttles_nothing(backend: Backend, noise: float) -> None:
    grads = gradients([30, 30], torch.float32, backend.device)
    grads[1].copy_(grads[0])
    modulate_(grads[:1], factors(backend.device, NAN), [0], noise=noise)
    modulate_(grads[1:], factors(backend.device, 1.0), [0], noise=noise)
    assert same(grads[:1], grads[1:])


def test_float16_saturates_what_was_finite(backend: Backend) -> None:
    values = torch.tensor([60000.0, -60000.0, INF, -INF, NAN, 2.0] * 9, dtype=torch.float16)
    grad = values.to(backend.device)
    modulate_([grad], factors(backend.device, 4.0), [0], noise=0.0)
    rows = grad.view(-1, 6)
    for row in rows:
        assert row[:4].tolist() == [65504.0, -65504.0, INF, -INF]
        assert row[4].isnan()
        assert row[5] == 8.0
    noisy = torch.tensor([65504.0, -65504.0] * 50, dtype=torch.float16, device=backend.device)
    modulate_([noisy], factors(backend.device, 1.0), [0])
    assert noisy.isfinite().all()
    assert (noisy.abs() == 65504.0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [1.0, 0.2, 0.01])
def test_finite_gradients_stay_finite(backend: Backend, dtype: torch.dtype, share: float) -> None:
    """Up to the largest number of the type: where noise could pass it there is none."""
    largest = torch.finfo(dtype).max
    grad = ((2 * torch.rand(5000, dtype=torch.float64) - 1) * share * largest).to(dtype)
    grad[0] = share * largest
    new = grad.clone().to(backend.device)
    modulate_([new], factors(backend.device, 1.0), [0])
    assert new.isfinite().all()
    noisy = dtype == torch.float16 or (share == 0.01 and dtype != torch.float64)
    assert torch.equal(new.cpu(), grad) == (not noisy)


def test_bfloat16_has_the_range_of_float32(backend: Backend) -> None:
    grad = torch.tensor([2.0**100, 2.0**127], dtype=torch.bfloat16, device=backend.device)
    modulate_([grad], factors(backend.device, 4.0), [0], noise=0.0)
    assert grad.tolist() == [2.0**102, INF]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_nearest_even(backend: Backend, dtype: torch.dtype) -> None:
    """Every finite number of the type, times one that puts products between two neighbours."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    grad = bits.view(dtype).to(backend.device)
    grad = grad[grad.isfinite()]
    for k in (0.3, 0.5, 2.0**-10, 3.0):
        new = grad.clone()
        modulate_([new], factors(backend.device, k), [0], noise=0.0)
        expected = scaled(grad, k)
        if dtype == torch.float16:
            expected = expected.clamp(-65504.0, 65504.0)
        assert same([new], [expected])


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(cpu: Backend) -> None:
    """The last elements get their own coefficient, noise and place."""
    count, tail = 2**31 + CHUNK + 3, CHUNK + 40
    grad = torch.zeros(count, dtype=torch.bfloat16)
    grad[-tail:] = torch.randn(tail).to(grad.dtype)
    before = grad[-tail:].clone()
    moments = torch.tensor([[101.0, 0.0, 100.0]], dtype=torch.float64)
    modulate_([grad], torch.tensor([0.5]), [0], moments=moments, eps=0.0, seed=2, step=3)
    first = noise_like(torch.empty(64), seed=2, step=3)
    last = noise_like(torch.empty(tail), seed=2, step=3, offset=count - tail)
    assert torch.equal(grad[:64], first.to(grad.dtype))
    expected = (0.5 * before.float() + last).to(grad.dtype)
    torch.testing.assert_close(grad[-tail:], expected, rtol=2**-7, atol=0)
