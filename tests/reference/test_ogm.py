"""The plain operations against loops over samples and elements, written from the formulas."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mmbal_fast.reference import (
    _noise,
    contribution_scores,
    discrepancy_ratios,
    gradient_moments,
    modulate_,
    modulation_coefficients,
    noise_like,
)

NAN, INF = math.nan, math.inf
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- scores


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(each - max(row)) for each in row]
    return [each / sum(exponentials) for each in exponentials]


def hard_score(logits: Tensor, target: Tensor, ignore_index: int = -100) -> float:
    rows = logits.double().movedim(1, -1).reshape(-1, logits.shape[1]).tolist()
    labels = target.flatten().tolist()
    return math.fsum(
        softmax(row)[label]
        for row, label in zip(rows, labels, strict=True)
        if label != ignore_index
    )


def soft_score(logits: Tensor, target: Tensor) -> float:
    rows = logits.double().movedim(1, -1).reshape(-1, logits.shape[1]).tolist()
    weights = target.double().movedim(1, -1).reshape(-1, logits.shape[1]).tolist()
    return math.fsum(
        weight * probability
        for row, per_class in zip(rows, weights, strict=True)
        for probability, weight in zip(softmax(row), per_class, strict=True)
    )


@pytest.mark.parametrize("modalities", [2, 3, 8])
@pytest.mark.parametrize("rest", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(modalities: int, rest: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = [3 * torch.randn(6, 4, *rest).to(dtype) for _ in range(modalities)]
    target = torch.randint(4, (6, *rest))
    target[0] = -100
    scores = contribution_scores(logits, target)

    assert scores.dtype == torch.float32
    assert scores.shape == (modalities,)
    assert scores.tolist() == pytest.approx([hard_score(x, target) for x in logits], rel=1e-6)


@pytest.mark.parametrize("rest", [(), (5,)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_scores_of_soft_labels(rest: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = [torch.randn(6, 4, *rest), torch.randn(6, 4, *rest)]
    target = torch.rand(6, 4, *rest).softmax(dim=1).to(dtype)
    scores = contribution_scores(logits, target)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([soft_score(x, target) for x in logits], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_scores_take_any_integer_labels(dtype: torch.dtype) -> None:
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    expected = contribution_scores([logits], target)
    assert torch.equal(contribution_scores([logits], target.to(dtype)), expected)


def test_scores_ignore_what_they_are_told_to() -> None:
    logits = torch.randn(5, 3)
    logits[3] = NAN
    target = torch.tensor([0, 1, 2, 1, 0])
    scores = contribution_scores([logits, logits], target, ignore_index=1)
    expected = hard_score(logits, target, ignore_index=1)
    assert scores.tolist() == pytest.approx([expected] * 2, rel=1e-6)
    ignored = contribution_scores([logits, logits], torch.full((5,), -100))
    assert ignored.tolist() == [0.0, 0.0]


def test_scores_of_an_empty_batch() -> None:
    logits = [torch.empty(0, 3), torch.empty(0, 3)]
    assert contribution_scores(logits, torch.empty(0, dtype=torch.long)).tolist() == [0.0, 0.0]
    assert contribution_scores(logits, torch.empty(0, 3)).tolist() == [0.0, 0.0]


def test_scores_of_large_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [-1e4, -1e4, 1e4]])
    target = torch.tensor([0, 1, 0])
    assert contribution_scores([logits, -logits], target).tolist() == [1.5, 0.5]


# --- ratios and coefficients


@pytest.mark.parametrize("modalities", [2, 3, 8])
def test_ratios(modalities: int) -> None:
    scores = 10 * torch.rand(modalities)
    s = scores.tolist()
    expected = [
        statistics.fmean(s[m] / s[j] for j in range(modalities) if j != m)
        for m in range(modalities)
    ]
    ratios = discrepancy_ratios(scores)
    assert ratios.dtype == torch.float32
    assert ratios.tolist() == pytest.approx(expected, rel=1e-6)


def test_ratios_of_two_are_reciprocal() -> None:
    assert discrepancy_ratios(torch.tensor([4.0, 2.0])).tolist() == [2.0, 0.5]


def test_ratios_of_zero_scores() -> None:
    assert discrepancy_ratios(torch.tensor([4.0, 0.0])).tolist() == [INF, 0.0]
    assert discrepancy_ratios(torch.zeros(2)).isnan().all()


RULES: dict[str, Callable[[float, float], float]] = {
    "cvpr2022": lambda rho, alpha: 1 - math.tanh(alpha * rho) if rho > 1 else 1.0,
    "cvpr2022_excess": lambda rho, alpha: 1 - math.tanh(alpha * (rho - 1)) if rho > 1 else 1.0,
    "tpami2024": lambda rho, alpha: max(0.0, 1 - alpha * math.tanh(rho - 1)) if rho > 1 else 1.0,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.8, 1.5])
def test_rules(rule: str, alpha: float) -> None:
    ratios = torch.tensor([0.0, 0.3, 1.0, 1.01, 1.5, 3.0, 40.0])
    expected = [RULES[rule](rho, alpha) for rho in ratios.tolist()]
    coefficients = modulation_coefficients(ratios, alpha, rule=rule)  # type: ignore[arg-type]
    assert coefficients.dtype == torch.float32
    assert coefficients.tolist() == pytest.approx(expected, abs=2e-7)


def test_published_rule_jumps_at_one() -> None:
    above = torch.tensor([1.0, 1.0 + 1e-6])
    jumps = [modulation_coefficients(above, alpha).tolist() for alpha in (0.1, 0.3, 0.8, 1.5)]
    assert [one for one, _ in jumps] == [1.0] * 4
    assert [other for _, other in jumps] == pytest.approx([0.900, 0.709, 0.336, 0.095], abs=5e-4)


@pytest.mark.parametrize(
    ("rule", "limit"), [("cvpr2022", 0.0), ("cvpr2022_excess", 0.0), ("tpami2024", 0.5)]
)
def test_infinite_and_undefined_ratios(rule: str, limit: float) -> None:
    ratios = torch.tensor([INF, 0.0, NAN])
    coefficients = modulation_coefficients(ratios, 0.5, rule=rule)  # type: ignore[arg-type]
    assert coefficients.tolist() == [limit, 1.0, 1.0]


def test_nothing_is_throttled_when_all_scores_are_zero() -> None:
    ratios = discrepancy_ratios(torch.zeros(3))
    assert modulation_coefficients(ratios, 0.5).tolist() == [1.0, 1.0, 1.0]


def test_alpha_zero_throttles_nothing() -> None:
    assert modulation_coefficients(torch.tensor([INF, 0.0]), 0.0).tolist() == [1.0, 1.0]


def test_callable_rule() -> None:
    weight = nn.Parameter(torch.tensor(2.0))
    ratios = torch.tensor([0.5, 4.0, NAN])
    coefficients = modulation_coefficients(ratios, 0.5, rule=lambda rho: weight.double() * rho)
    assert coefficients.tolist() == [1.0, 8.0, 1.0]
    assert coefficients.dtype == torch.float32
    assert not coefficients.requires_grad


def test_unknown_rule() -> None:
    with pytest.raises(KeyError, match="cvpr2023"):
        modulation_coefficients(torch.ones(2), 0.5, rule="cvpr2023")  # type: ignore[arg-type]


def test_no_autograd_graph() -> None:
    logits = [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    scores = contribution_scores(logits, torch.tensor([0, 1, 2, 0]))
    assert not scores.requires_grad
    scores = torch.rand(2, requires_grad=True)
    assert not discrepancy_ratios(scores).requires_grad
    assert not modulation_coefficients(scores, 0.5).requires_grad
    assert not gradient_moments([scores]).requires_grad


# --- moments


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_moments(dtype: torch.dtype, count: int) -> None:
    grad = (torch.randn(count) + 3).to(dtype)
    values = grad.double().tolist()
    mean = statistics.fmean(values)
    moments = gradient_moments([grad])
    assert moments.dtype == torch.float64
    assert moments[0].tolist() == pytest.approx(
        [count, mean, sum((each - mean) ** 2 for each in values)], rel=1e-12, abs=1e-14
    )


def test_moments_do_not_cancel() -> None:
    grad = 1e4 + torch.randn(10_000)
    count, _, m2 = gradient_moments([grad])[0].tolist()
    assert math.sqrt(m2 / (count - 1)) == pytest.approx(statistics.stdev(grad.tolist()), rel=1e-9)


def test_moments_of_nothing() -> None:
    moments = gradient_moments([None, torch.empty(0, 3), torch.tensor(5.0), None])
    assert moments.tolist() == [[0, 0, 0], [0, 0, 0], [1, 5, 0], [0, 0, 0]]
    assert gradient_moments([]).shape == (0, 3)
    assert gradient_moments([None]).tolist() == [[0, 0, 0]]


# --- update

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(3, 4, 5, 2),
    "channels_last": lambda: torch.randn(3, 4, 5, 2).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(6, 7).t(),
    "sliced": lambda: torch.randn(6, 8)[:, 1:6:2],
    "strided": lambda: torch.randn(20)[::3],
    "offset view": lambda: torch.randn(20)[3:],
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.empty(0, 3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_noise_the_update_is_a_product(dtype: torch.dtype, layout: str) -> None:
    grad = LAYOUTS[layout]().to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.tensor([0.3, 0.7])
    expected = (grad.to(wide) * factor[1].to(wide)).to(dtype)
    modulate_([grad], factor, [1], noise=0.0)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_update(layout: str) -> None:
    grad = LAYOUTS[layout]()
    z = noise_like(grad, seed=11, step=3, tensor_id=5, offset=2).flatten().tolist()
    g = grad.flatten().tolist()
    std = statistics.stdev(g) if len(g) > 1 else 0.0
    expected = [0.3 * g[i] + 0.5 * (std + 1e-8) * z[i] for i in range(len(g))]
    modulate_(
        [grad], torch.tensor([0.3]), [0], noise=0.5, seed=11, step=3, tensor_ids=[5], offsets=[2]
    )
    assert grad.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_gaps_of_a_sliced_gradient_stay() -> None:
    base = torch.randn(6, 8)
    before = base.clone()
    modulate_([base[:, ::2]], torch.tensor([0.5]), [0])
    assert torch.equal(base[:, 1::2], before[:, 1::2])
    assert (base[:, ::2] != before[:, ::2]).all()


def test_every_tensor_has_its_modality_noise_and_deviation() -> None:
    grads = [(m + 1) * torch.randn(20_000) for m in (0, 1, 2)]
    before = [grad.clone() for grad in grads]
    factors = [0.0, 0.5, 1.0]
    modulate_([None, *grads], torch.tensor(factors), [0, 2, 0, 1], seed=1, step=2)
    noises = []
    for grad, old, factor, number in zip(grads, before, [1.0, 0.0, 0.5], (1, 2, 3), strict=True):
        residual = grad - factor * old
        assert residual.std().item() == pytest.approx(old.std().item(), rel=0.03)
        noises.append(residual / (old.std() + 1e-8))
        z = noise_like(old, seed=1, step=2, tensor_id=number)
        torch.testing.assert_close(noises[-1], z, rtol=0, atol=2e-6)


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, chunk: int, layout: str) -> None:
    grad = LAYOUTS[layout]()
    expected = grad.clone()
    if layout in ("sliced", "strided"):
        expected = expected.contiguous()
    modulate_([expected], torch.tensor([0.3]), [0], seed=1, offsets=[5])
    monkeypatch.setattr(_noise, "CHUNK", chunk)
    modulate_([grad], torch.tensor([0.3]), [0], seed=1, offsets=[5])
    assert torch.equal(grad, expected)


def test_uneven_shards_get_the_same_bits() -> None:
    whole = torch.randn(11, 3)
    moments = gradient_moments([whole])
    shards = [shard.clone() for shard in torch.split(whole, [1, 4, 6])]
    modulate_([whole], torch.tensor([0.3]), [0], seed=4, tensor_ids=[17])
    modulate_(
        shards,
        torch.tensor([0.3]),
        [0, 0, 0],
        seed=4,
        tensor_ids=[17] * 3,
        offsets=[0, 3, 15],
        moments=moments.expand(3, 3),
    )
    assert torch.equal(torch.cat(shards), whole)


def test_given_moments_are_used() -> None:
    grad = torch.zeros(100)
    z = noise_like(grad, seed=0, step=0)
    moments = torch.tensor([[5.0, 0.0, 16.0]], dtype=torch.float64)
    modulate_([grad], torch.ones(1), [0], moments=moments)
    torch.testing.assert_close(grad, 2 * z)


def test_eps_is_what_a_constant_gradient_gets() -> None:
    grad = torch.ones(8, dtype=torch.float64)
    z = noise_like(grad, seed=0, step=0)
    modulate_([grad], torch.ones(1), [0], eps=0.25)
    torch.testing.assert_close(grad, 1 + 0.25 * z, rtol=0, atol=1e-15)


def test_one_element_has_no_deviation() -> None:
    grad = torch.tensor([3.0])
    modulate_([grad], torch.tensor([0.5]), [0], eps=0.0)
    assert grad.item() == 1.5


def test_step_as_a_tensor() -> None:
    one, other = torch.randn(2, 9).unbind()
    other.copy_(one)
    modulate_([one], torch.ones(1), [0], step=6)
    modulate_([other], torch.ones(1), [0], step=torch.tensor(6))
    assert torch.equal(one, other)


def test_undefined_coefficient_throttles_nothing() -> None:
    grad = torch.randn(9)
    expected = grad.clone()
    modulate_([grad], torch.tensor([NAN]), [0], noise=0.0)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_gradient_is_only_scaled(bad: float, dtype: torch.dtype) -> None:
    grad, clean = torch.tensor([1.0, bad, -2.0], dtype=dtype), torch.randn(5).to(dtype)
    before = clean.clone()
    modulate_([grad, clean], torch.tensor([0.5]), [0, 0])
    assert grad[[0, 2]].tolist() == [0.5, -1.0]
    assert torch.equal(grad[1:2].isnan(), torch.tensor([math.isnan(bad)]))
    assert not grad[1].isfinite()
    assert clean.isfinite().all()
    assert not torch.equal(clean, 0.5 * before)


def test_float16_saturates_what_was_finite() -> None:
    grad = torch.tensor([60000.0, -60000.0, INF, -INF, NAN, 2.0], dtype=torch.float16)
    modulate_([grad], torch.tensor([4.0]), [0], noise=0.0)
    assert grad[:4].tolist() == [65504.0, -65504.0, INF, -INF]
    assert grad[4].isnan()
    assert grad[5] == 8.0
    noisy = torch.tensor([65504.0, -65504.0] * 50, dtype=torch.float16)
    modulate_([noisy], torch.ones(1), [0])
    assert noisy.isfinite().all()


def test_bfloat16_has_the_range_of_float32() -> None:
    grad = torch.tensor([2.0**100, 2.0**127], dtype=torch.bfloat16)
    modulate_([grad], torch.tensor([4.0]), [0], noise=0.0)
    assert grad.tolist() == [2.0**102, INF]


def test_gradients_in_a_graph_are_updated_in_place() -> None:
    weight = nn.Parameter(torch.randn(3, 3))
    (grad,) = torch.autograd.grad(weight.pow(3).sum(), weight, create_graph=True)
    expected = 0.5 * grad.detach()
    address = grad.data_ptr()
    modulate_([grad], torch.tensor([0.5], requires_grad=True), [0], noise=0.0)
    assert torch.equal(grad, expected)
    assert grad.data_ptr() == address


def test_nothing_is_read_by_the_host() -> None:
    """Tensors on the meta device have no values: reading one raises."""
    with torch.device("meta"):
        logits, target = [torch.empty(4, 3), torch.empty(4, 3)], torch.empty(4).long()
        step = torch.empty((), dtype=torch.int64)
        grads = [torch.empty(5, 2), None, torch.empty(6, 4).t()[::2], torch.empty(3).half()]
    ratios = discrepancy_ratios(contribution_scores(logits, target))
    coefficients = modulation_coefficients(ratios, 0.5)
    assert coefficients.device.type == "meta"
    modulate_(grads, coefficients, [0, 1, 1, 0], step=step)
