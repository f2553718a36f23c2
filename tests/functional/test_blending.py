from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbal_fast import _backend, functional, reference

if TYPE_CHECKING:
    from tests.conftest import Backend

NAN, INF = math.nan, math.inf
Losses = tuple[list[float], list[float], list[float], list[float]]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- OGR and weights -----------------------------------------------------------------------------

#             healthy  overfitting  diverged
HEADS: Losses = ([2.0, 2.0, 2.0], [2.1, 2.2, 2.0], [1.0, 0.5, 2.5], [1.3, 1.4, 3.0])
# O before 0.1, 0.2, 0; after 0.3, 0.9, 0.5, so dO = 0.2, 0.7, 0.5; dG = 0.8, 0.8, -1.


def test_ratio_by_hand() -> None:
    ratio = functional.overfitting_to_generalization_ratio(*HEADS)
    torch.testing.assert_close(ratio, f64(0.25, 0.875, 0.5))


def test_ratio_takes_increments_not_the_last_losses() -> None:
    # Both heads end at the same losses; the second one started with the gap it has at the end.
    ratio = functional.overfitting_to_generalization_ratio(
        [2.0, 1.5], [2.0, 2.0], [0.5, 0.5], [1.0, 1.0]
    )
    torch.testing.assert_close(ratio, f64(0.5, 0.0))


def test_ratio_without_gain_is_infinite_or_nan() -> None:
    ratio = functional.overfitting_to_generalization_ratio(
        [1.0, 1.0, NAN], [1.0, 1.0, 1.0], [0.5, 1.0, 0.5], [1.0, 1.0, 0.5]
    )
    torch.testing.assert_close(ratio, f64(INF, NAN, NAN), equal_nan=True)


def test_weights_by_hand() -> None:
    # dG / dO^2 = 20 and 0.8 / 0.49; the diverged head would get 4 by its absolute value.
    healthy, overfitting = 20.0, 0.8 / 0.49
    weights = functional.blending_weights(*HEADS)
    total = healthy + overfitting
    torch.testing.assert_close(weights, f64(healthy / total, overfitting / total, 0.0))


@pytest.mark.parametrize("broken", range(4))
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_head_with_a_loss_that_is_not_finite_gets_nothing(broken: int, value: float) -> None:
    losses = [torch.tensor(each) for each in HEADS]
    losses[broken][0] = value
    torch.testing.assert_close(functional.blending_weights(*losses), f64(0.0, 1.0, 0.0))


def test_gap_that_did_not_move_is_floored_at_a_tenth_of_the_largest_gain() -> None:
    # dG = 0.2 and 0.5, dO = 0 and 0.25: floored to 0.05, so 0.2 / 0.0025 = 80 against 8.
    weights = functional.blending_weights([1.0, 1.0], [1.0, 1.0], [0.8, 0.25], [0.8, 0.5])
    torch.testing.assert_close(weights, f64(80 / 88, 8 / 88))
    lower = functional.blending_weights([1.0, 1.0], [1.0, 1.0], [0.8, 0.25], [0.8, 0.5], floor=0.02)
    torch.testing.assert_close(lower, f64(2000 / 2008, 8 / 2008))


@pytest.mark.parametrize(
    ("train_after", "val_after"),
    [([0.5, 0.5], [1.0, 1.5]), ([NAN, 0.5], [NAN, 1.5]), ([1.0, 1.0], [1.0, 1.0])],
    ids=["worse", "nan", "still"],
)
def test_no_head_gained_gives_uniform_weights_and_a_warning(
    train_after: list[float], val_after: list[float]
) -> None:
    with pytest.warns(
        RuntimeWarning, match=r"no head gained.*got validation losses \[1\.0, 1\.0\]"
    ):
        weights = functional.blending_weights([1.0, 1.0], [1.0, 1.0], train_after, val_after)
    torch.testing.assert_close(weights, f64(0.5, 0.5))


@pytest.mark.parametrize("factor", [1e-6, 0.5, 1e6])
def test_scaling_all_losses_changes_no_weight(factor: float) -> None:
    # With a gap that did not move, so that an absolute floor would show.
    losses = [
        f64(1.0, 1.0, 1.0, 1.0),
        f64(1.1, 1.2, 1.0, 1.0),
        f64(0.4, 0.3, 0.5, 0.5),
        f64(0.6, 0.8, 0.5, 2.0),
    ]
    weights = functional.blending_weights(*losses)
    torch.testing.assert_close(functional.blending_weights(*[factor * x for x in losses]), weights)
    assert weights[3] == 0
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(), f64(1.0)[0])


@pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
def test_increments_are_taken_in_float64(module: ModuleType) -> None:
    # In float32 the gaps, near 1000, would be rounded to 6e-5.
    losses = [torch.tensor(each) for each in ([0.3, 0.1], [1000.5, 1000.5], [0.2, 0.1], [1e3, 0.3])]
    assert losses[0].dtype == torch.float32
    ratio = module.overfitting_to_generalization_ratio(*losses)
    train_before, val_before, train_after, val_after = (each.tolist() for each in losses)
    for k in range(2):
        gap = (val_after[k] - train_after[k]) - (val_before[k] - train_before[k])
        assert ratio[k] == pytest.approx(abs(gap / (val_before[k] - val_after[k])), rel=1e-12)


@pytest.mark.parametrize(
    "op", [functional.overfitting_to_generalization_ratio, functional.blending_weights]
)
def test_bad_losses_are_refused(op) -> None:
    two, three = [1.0, 1.0], [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"at least 2 heads \(got 1\)"):
        op([1.0], [1.0], [1.0], [1.0])
    with pytest.raises(ValueError, match=r"one shape \[K\] \(got .*\(3,\)"):
        op(two, two, two, three)
    with pytest.raises(ValueError, match=r"one shape \[K\]"):
        op(*[torch.ones(2, 2)] * 4)
    with pytest.raises(ValueError, match=r"one device \(got \['cpu', 'cpu', 'meta', 'cpu'\]"):
        op(two, two, torch.ones(2, device="meta"), two)


@pytest.mark.parametrize("floor", [0.0, -1.0, NAN, INF])
def test_bad_floor_is_refused(floor: float) -> None:
    with pytest.raises(ValueError, match=f"floor must be a positive number .got {floor}"):
        functional.blending_weights(*HEADS, floor=floor)


def test_weights_compile() -> None:
    compiled = torch.compile(functional.blending_weights, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(*[torch.tensor(each) for each in HEADS]), functional.blending_weights(*HEADS)
    )


# --- the blended loss ----------------------------------------------------------------------------


def heads(
    shape: tuple[int, ...], count: int = 3, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return [
        (scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
        for _ in range(count)
    ]


def labels(shape: tuple[int, ...], kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    if kind == "soft":
        return torch.randn(shape, generator=generator).softmax(1)
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)
    if kind == "ignored":
        target.view(-1)[::3] = -100
    return target


def gradient(each: Tensor) -> Tensor:
    assert each.grad is not None
    return each.grad


def expected(
    logits: list[Tensor], target: Tensor, weights: list[float], label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sum of cross-entropies that the fused loss replaces, in float64."""
    target = target.double() if target.is_floating_point() else target
    per_head = [
        F.cross_entropy(each.double(), target, label_smoothing=label_smoothing) for each in logits
    ]
    loss = sum((w * each for w, each in zip(weights, per_head, strict=True)), f64(0.0)[0])
    return loss, torch.stack(per_head).detach()


@pytest.fixture
def blended(backend: Backend) -> Callable:
    """The operation by each of the backends, given and giving tensors on the CPU."""

    def run(
        logits: Sequence[Tensor], target: Tensor, weights: Tensor | list[float], **options
    ) -> tuple[Tensor, Tensor]:
        loss, per_head = functional.blended_cross_entropy(
            [each.to(backend.device) for each in logits],
            target.to(backend.device),
            weights.to(backend.device) if isinstance(weights, Tensor) else weights,
            **options,
        )
        return loss.cpu(), per_head.cpu()

    return run


TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def assert_like_cross_entropy(
    blended,
    logits: list[Tensor],
    target: Tensor,
    weights: list[float],
    label_smoothing: float = 0.0,
) -> None:
    loss, per_head = blended(logits, target, weights, label_smoothing=label_smoothing)
    wide = [each.detach().double().requires_grad_() for each in logits]
    loss_expected, per_head_expected = expected(wide, target, weights, label_smoothing)

    wanted = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    assert loss.dtype == per_head.dtype == wanted
    assert loss.shape == ()
    assert not per_head.requires_grad
    eps = 1e-12 if wanted == torch.float64 else 2e-6
    torch.testing.assert_close(loss.double(), loss_expected, rtol=eps, atol=eps, equal_nan=True)
    torch.testing.assert_close(
        per_head.double(), per_head_expected, rtol=eps, atol=eps, equal_nan=True
    )
    (loss * 3).backward()
    (loss_expected * 3).backward()
    tolerance = TOLERANCE[logits[0].dtype]
    for each, exact in zip(logits, wide, strict=True):
        assert gradient(each).dtype == each.dtype
        torch.testing.assert_close(
            gradient(each).double(), gradient(exact), rtol=4 * tolerance, atol=1e-7
        )


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", ["index", "ignored", "soft"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_equals_sum_of_cross_entropies(
    blended, dtype: torch.dtype, kind: str, label_smoothing: float
) -> None:
    shape = (17, 6)
    assert_like_cross_entropy(
        blended,
        heads(shape, dtype=dtype),
        labels(shape, kind),
        [0.5, 0.2, 0.3],
        label_smoothing=label_smoothing,
    )


@pytest.mark.parametrize("classes", [2, 7, 310, 21_000])
@pytest.mark.parametrize("kind", ["index", "soft"])
def test_any_number_of_classes(blended, classes: int, kind: str) -> None:
    shape = (5, classes)
    assert_like_cross_entropy(blended, heads(shape), labels(shape, kind), [0.5, 0.2, 0.3])


@pytest.mark.parametrize("count", [2, 5, 9])
def test_any_number_of_heads(blended, count: int) -> None:
    shape = (4, 3)
    weights = [(k + 1) / 10 for k in range(count)]
    assert_like_cross_entropy(blended, heads(shape, count), labels(shape, "index"), weights)


@pytest.mark.parametrize("kind", ["index", "ignored", "soft"])
def test_more_dimensions(blended, kind: str) -> None:
    shape = (2, 4, 3, 5)
    assert_like_cross_entropy(blended, heads(shape), labels(shape, kind), [0.5, 0.2, 0.3])


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_logits(blended, offset: float, label_smoothing: float) -> None:
    # A shift common to a row changes nothing, unless maximum and logarithm are added up first.
    shape = (64, 10)
    logits = [(each.detach() + offset).requires_grad_() for each in heads(shape)]
    target = labels(shape, "index")
    assert_like_cross_entropy(
        blended, logits, target, [0.5, 0.2, 0.3], label_smoothing=label_smoothing
    )
    assert_like_cross_entropy(
        blended, heads(shape, scale=1e4), target, [0.5, 0.2, 0.3], label_smoothing=label_smoothing
    )


@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize("batch", [0, 1])
def test_batch_of_none_and_one(blended, batch: int, kind: str) -> None:
    shape = (batch, 3)
    assert_like_cross_entropy(blended, heads(shape), labels(shape, kind), [0.5, 0.2, 0.3])


def test_all_labels_ignored_is_nan_with_zero_gradients(blended) -> None:
    logits = heads((4, 3))
    loss, per_head = blended(logits, torch.full((4,), 9), [0.5, 0.2, 0.3], ignore_index=9)
    assert loss.isnan()
    assert per_head.isnan().all()
    loss.backward()
    for each in logits:
        assert torch.equal(gradient(each), torch.zeros(4, 3))


@pytest.mark.parametrize("value", [NAN, INF])
def test_diverged_head_of_weight_0_harms_nobody(blended, value: float) -> None:
    broken, healthy = heads((4, 3), count=2)
    alone = healthy.detach().clone().requires_grad_()
    target = labels((4, 3), "index")
    with torch.no_grad():
        broken[2] = value
    loss, per_head = blended([broken, healthy], target, [0.0, 0.5])
    wanted = 0.5 * F.cross_entropy(alone, target)
    torch.testing.assert_close(loss, wanted)
    assert per_head[0].isnan()
    loss.backward()
    wanted.backward()
    assert torch.equal(gradient(broken), torch.zeros(4, 3))
    torch.testing.assert_close(healthy.grad, alone.grad)


def test_masked_class_is_allowed(blended) -> None:
    logits = heads((4, 3), count=2)
    with torch.no_grad():
        logits[0][:, 2] = -INF
    target = torch.tensor([0, 1, 1, 0])
    assert_like_cross_entropy(blended, logits, target, [0.5, 0.5])


def test_weights_may_be_a_tensor_of_any_floating_dtype(blended) -> None:
    logits, target = heads((4, 3)), labels((4, 3), "index")
    loss, _ = blended(logits, target, [0.5, 0.25, 0.25])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        again, _ = blended(logits, target, torch.tensor([0.5, 0.25, 0.25], dtype=dtype))
        assert torch.equal(loss, again)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_any_integer_labels(blended, dtype: torch.dtype) -> None:
    logits, target = heads((4, 3)), labels((4, 3), "index")
    assert torch.equal(
        blended(logits, target.to(dtype), [0.5, 0.25, 0.25])[0],
        blended(logits, target, [0.5, 0.25, 0.25])[0],
    )


@pytest.mark.parametrize(
    ("narrow", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str
)
def test_heads_may_differ_in_dtype(blended, narrow: torch.dtype, wide: torch.dtype) -> None:
    logits = [
        each.detach().to(dtype).requires_grad_()
        for each, dtype in zip(heads((4, 3), count=2), (narrow, wide), strict=True)
    ]
    target = labels((4, 3), "index")
    loss, per_head = blended(logits, target, [0.5, 0.5])
    wanted = torch.stack([F.cross_entropy(each.to(wide), target) for each in logits])
    torch.testing.assert_close(per_head, wanted.detach())
    loss.backward()
    for each, dtype in zip(logits, (narrow, wide), strict=True):
        assert gradient(each).dtype == dtype
        exact = each.detach().double().requires_grad_()
        (0.5 * F.cross_entropy(exact, target)).backward()
        torch.testing.assert_close(gradient(each), gradient(exact).to(dtype), rtol=0.01, atol=1e-6)


def test_head_that_needs_no_gradient_gets_none() -> None:
    frozen, free = heads((4, 3), count=2)
    frozen.requires_grad_(False)
    loss, _ = functional.blended_cross_entropy([frozen, free], labels((4, 3), "index"), [0.5, 0.5])
    loss.backward()
    assert frozen.grad is None
    assert free.grad is not None


def test_logits_that_are_not_contiguous(blended) -> None:
    base = torch.randn(6, 8)
    logits = [base.t()[:, ::2].detach().requires_grad_(), base.t()[:, 1::2].requires_grad_()]
    assert_like_cross_entropy(blended, logits, labels((8, 3), "index"), [0.5, 0.5])


@pytest.mark.parametrize("kind", ["index", "ignored", "soft"])
def test_gradcheck(kind: str) -> None:
    logits = heads((5, 4), dtype=torch.float64)
    target = labels((5, 4), kind)
    target = target.double() if kind == "soft" else target

    def loss(*each: Tensor) -> Tensor:
        return functional.blended_cross_entropy(each, target, [0.5, 0.2, 0.3], label_smoothing=0.1)[
            0
        ]

    assert torch.autograd.gradcheck(loss, logits)


def test_autocast() -> None:
    layers = [nn.Linear(4, 3) for _ in range(2)]
    x, target = torch.randn(8, 4), torch.randint(3, (8,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = [layer(x) for layer in layers]
        loss, _ = functional.blended_cross_entropy(logits, target, [0.5, 0.5])
        wanted = 0.5 * sum(F.cross_entropy(each, target) for each in logits)
    assert logits[0].dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)


def test_no_grad_and_inference_mode() -> None:
    logits, target = heads((4, 3)), labels((4, 3), "index")
    wanted = functional.blended_cross_entropy(logits, target, [0.5, 0.25, 0.25])[0].detach()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            loss = functional.blended_cross_entropy(logits, target, [0.5, 0.25, 0.25])[0]
        assert not loss.requires_grad
        assert torch.equal(loss, wanted)


@pytest.mark.parametrize("label", [-1, 3, -100, 2**40])
def test_label_out_of_range(label: int) -> None:
    logits, target = heads((4, 3)), torch.tensor([0, 1, label, 2])
    with pytest.raises(
        IndexError, match=rf"target must be in \[0, 3\) or ignore_index \(got {label} at 2\)"
    ):
        functional.blended_cross_entropy(logits, target, [0.5, 0.25, 0.25], ignore_index=9)


def test_label_out_of_range_is_nan_on_a_device(native: Backend) -> None:
    if not native.cuda_kernels:
        pytest.skip("the CPU looks before it starts")
    for classes in (3, 40, 1100):
        logits = [each.detach().to(native.device) for each in heads((4, classes), count=2)]
        for each in logits:
            each.requires_grad_()
        target = torch.tensor([0, classes, -100, 1], device=native.device)
        loss, per_head = functional.blended_cross_entropy(logits, target, [0.5, 0.5])
        assert loss.isnan()
        assert per_head.isnan().all()
        loss.backward()
        for each in logits:
            grad = gradient(each)
            assert grad[1].isnan().all()
            assert not grad[2].any()
            assert grad[[0, 3]].isfinite().all()


# --- what differs inside the kernels -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ignored", "soft"])
def test_more_rows_than_threads_of_a_grid(blended, kind: str) -> None:
    # 256 blocks of 8 warps read 2048 rows at a time; chunks of the CPU end within these rows.
    shape = (2500, 2)
    weights, target = [0.5, 0.5], labels(shape, kind)
    assert_like_cross_entropy(blended, heads(shape, count=2), target, weights, 0.1)


@pytest.mark.parametrize("classes", [33, 64, 1100])
@pytest.mark.parametrize("kind", ["ignored", "soft"])
def test_rows_of_every_length(blended, classes: int, kind: str) -> None:
    # Rows of 33 classes and more are read along, those of 1025 and more by a block of threads.
    shape = (11, classes)
    weights, target = [0.5, 0.5], labels(shape, kind)
    assert_like_cross_entropy(blended, heads(shape, count=2), target, weights, 0.1)
    assert_like_cross_entropy(
        blended, heads(shape, count=2, dtype=torch.float16), target, weights, 0.1
    )


@pytest.mark.parametrize("shape", [(9000, 6), (1500, 40)])
def test_number_of_threads_changes_no_bit(shape: tuple[int, int], cpu: Backend) -> None:
    target = labels(shape, "ignored")
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        logits = heads(shape)
        with _backend.using(cpu.native):
            loss, per_head = functional.blended_cross_entropy(logits, target, [0.5, 0.2, 0.3])
            loss.backward()
        results.append([loss.detach(), per_head, *map(gradient, logits)])
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            assert torch.equal(one, another)


ISA = """
import sys, torch
from torch.nn import functional as F
from mmbal_fast import _backend, functional, reference
assert _backend.native.cpu_isa() == sys.argv[1]
torch.manual_seed(0)
for classes in (2, 7, 32, 33, 310):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        logits = [torch.randn(19, classes).to(dtype).requires_grad_() for _ in range(2)]
        wide = [each.detach().double().requires_grad_() for each in logits]
        index = torch.randint(classes, (19,))
        index[3] = -100
        for target in (index, torch.rand(19, classes).softmax(1)):
            exact = target.double() if target.is_floating_point() else target
            loss = functional.blended_cross_entropy(logits, target, [1, 2], label_smoothing=0.1)[0]
            a, b = (F.cross_entropy(each, exact, label_smoothing=0.1) for each in wide)
            torch.testing.assert_close(loss.double(), a + 2 * b, rtol=1e-5, atol=1e-5)
            for one, other in zip(
                torch.autograd.grad(loss, logits), torch.autograd.grad(a + 2 * b, wide)
            ):
                torch.testing.assert_close(one, other.to(dtype), rtol=2e-2, atol=1e-6)
"""


def test_other_instruction_sets(cpu: Backend) -> None:
    assert cpu.native is not None
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for isa in cpu.native.cpu_isas():
        if isa == cpu.native.cpu_isa():
            continue  # the other tests run it
        subprocess.run(
            [sys.executable, "-c", ISA, isa],
            env={**environment, "MMBAL_CPU_ISA": isa},
            check=True,
            timeout=120,
        )


def test_bad_input_is_refused() -> None:
    a, b = torch.zeros(4, 3), torch.zeros(4, 3)
    target = torch.zeros(4, dtype=torch.long)
    blended = functional.blended_cross_entropy

    def refused(error: type[Exception], match: str, *args, **options) -> None:
        with pytest.raises(error, match=f"^blended_cross_entropy: .*{match}"):
            blended(*args, **options)

    refused(ValueError, r"at least 2 heads \(got 1\)", [a], target, [1.0])
    refused(ValueError, r"one shape .*\[4, 3\], \[4, 2\]", [a, b[:, :2]], target, [1.0, 1.0])
    refused(ValueError, r"one shape .*\(got \[\[4\], \[4\]", [a[:, 0], b[:, 0]], target, [1, 1])
    refused(TypeError, "must be float32.*torch.int64", [a, b.long()], target, [1.0, 1.0])
    refused(TypeError, "must be float32.*complex64", [a, b.to(torch.complex64)], target, [1.0, 1.0])
    refused(TypeError, "integer labels.*torch.bool", [a, b], target.bool(), [1.0, 1.0])
    refused(ValueError, r"target must have shape \[4\].*got \[3\]", [a, b], target[:3], [1.0, 1.0])
    refused(
        ValueError,
        r"target must have shape \[4, 3\].*got \[4\]",
        [a, b],
        target.float(),
        [1.0, 1.0],
    )
    refused(ValueError, r"one device \(got.*meta", [a, b], target.to("meta"), [1.0, 1.0])
    refused(ValueError, r"one device \(got.*meta", [a, b.to("meta")], target, [1.0, 1.0])
    refused(ValueError, r"weights must be \[2\].*\(got \[3\]", [a, b], target, [1.0, 1.0, 1.0])
    refused(
        ValueError, "on the logits' device cpu .got meta", [a, b], target, torch.ones(2).to("meta")
    )
    refused(ValueError, "weights are constants", [a, b], target, torch.ones(2, requires_grad=True))
    soft = torch.full((4, 3), 1 / 3, requires_grad=True)
    refused(ValueError, "soft labels are constants", [a, b], soft, [1.0, 1.0])
    for smoothing in (-0.1, 1.1, NAN):
        refused(
            ValueError,
            f"0 to 1 .got {smoothing}",
            [a, b],
            target,
            [1, 1],
            label_smoothing=smoothing,
        )


# --- more than one derivative


def penalty(loss: Tensor, logits: list[Tensor]) -> list[Tensor]:
    """The gradient of a gradient penalty."""
    first = torch.autograd.grad(loss, logits, create_graph=True)
    return list(torch.autograd.grad(loss + sum(each.square().sum() for each in first), logits))


@pytest.mark.parametrize("kind", ["ignored", "soft"])
def test_differentiated_twice(backend: Backend, kind: str) -> None:
    logits, target = heads((5, 4), dtype=torch.float64), labels((5, 4), kind)
    target = (target.double() if kind == "soft" else target).to(backend.device)
    logits = [each.detach().to(backend.device).requires_grad_() for each in logits]
    weights = [0.5, 0.0, 0.3]
    loss, _ = functional.blended_cross_entropy(logits, target, weights, label_smoothing=0.1)
    plain = sum(
        w * F.cross_entropy(x, target, label_smoothing=0.1)
        for w, x in zip(weights, logits, strict=True)
    )
    for one, other in zip(penalty(loss, logits), penalty(plain, logits), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch.func itself
def test_transforms_of_torch_func(backend: Backend) -> None:
    logits = torch.randn(2, 5, 4, dtype=torch.float64, device=backend.device)
    target, direction = torch.tensor([0, 1, 2, 3, -100]).to(backend.device), torch.ones_like(logits)

    def ours(x: Tensor) -> Tensor:
        return functional.blended_cross_entropy(list(x.unbind()), target, [0.5, 0.3])[0]

    def plain(x: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(x[0], target) + 0.3 * F.cross_entropy(x[1], target)

    for transform in (
        lambda f: torch.func.grad(f)(logits),
        lambda f: torch.func.jvp(f, (logits,), (direction,))[1],
        lambda f: torch.func.vmap(f)(torch.stack([logits, 2 * logits])),
        lambda f: torch.func.hessian(f)(logits),
    ):
        torch.testing.assert_close(transform(ours), transform(plain))


# --- torch.library and torch.compile -------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"), [("ignored", torch.float32), ("soft", torch.bfloat16)], ids=str
)
def test_opcheck(kind: str, dtype: torch.dtype) -> None:
    logits, target = heads((5, 4), dtype=dtype), labels((5, 4), kind)
    weights = f64(0.5, 0.2, 0.3)
    args = (logits, target, weights, 0.1, -100)
    torch.library.opcheck(torch.ops.mmbal.blended_cross_entropy.default, args)
    _, _, normalizers, count = torch.ops.mmbal.blended_cross_entropy(*args)
    plain = [each.detach() for each in logits]
    torch.library.opcheck(
        torch.ops.mmbal.blended_cross_entropy_backward.default,
        (torch.tensor(2.0), plain, target, weights, normalizers, count, 0.1, -100),
    )


@pytest.mark.parametrize("kind", ["ignored", "soft"])
def test_compiles_without_a_graph_break(kind: str) -> None:
    logits, target = heads((5, 4, 2)), labels((5, 4, 2), kind)
    again = [each.detach().clone().requires_grad_() for each in logits]
    compiled = torch.compile(
        functional.blended_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=False
    )
    weights = f64(0.5, 0.2, 0.3)
    loss, per_head = functional.blended_cross_entropy(logits, target, weights, label_smoothing=0.1)
    loss_compiled, per_head_compiled = compiled(again, target, weights, label_smoothing=0.1)
    torch.testing.assert_close(loss_compiled, loss, rtol=0, atol=0)
    torch.testing.assert_close(per_head_compiled, per_head, rtol=0, atol=0)
    loss.backward()
    loss_compiled.backward()
    for each, other in zip(logits, again, strict=True):
        torch.testing.assert_close(other.grad, each.grad, rtol=0, atol=0)
