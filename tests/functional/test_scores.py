"""Scores, ratios and coefficients against their formulas, written with Python's floats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from mmbal_fast.functional import (
    contribution_scores,
    discrepancy_ratios,
    modulation_coefficients,
)

if TYPE_CHECKING:
    from tests.conftest import Backend

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    exponentials = [math.exp(each - top) for each in row]
    total = math.fsum(exponentials)
    return [each / total for each in exponentials]


def rows(logits: Tensor) -> list[list[float]]:
    return logits.cpu().double().movedim(1, -1).reshape(-1, logits.shape[1]).tolist()


def hard_score(logits: Tensor, target: Tensor, ignore_index: int = -100) -> float:
    labels = target.flatten().tolist()
    return math.fsum(
        softmax(row)[label]
        for row, label in zip(rows(logits), labels, strict=True)
        if label != ignore_index
    )


def soft_score(logits: Tensor, target: Tensor) -> float:
    return math.fsum(
        weight * probability
        for row, weights in zip(rows(logits), rows(target), strict=True)
        for probability, weight in zip(softmax(row), weights, strict=True)
    )


def multi_label_score(logits: Tensor, target: Tensor, statistic: str) -> float:
    def of(x: float, t: float) -> float:
        if statistic == "accuracy":
            return float((x > 0) == (t > 0.5))
        both = [1 / (1 + math.exp(-x)), 1 / (1 + math.exp(x))]
        if statistic == "log_probability":
            both = [max(math.log(each), math.log(1e-8)) for each in both]
        return t * both[0] + (1 - t) * both[1]

    return math.fsum(
        statistics.fmean(of(x, t) for x, t in zip(row, labels, strict=True))
        for row, labels in zip(rows(logits), rows(target), strict=True)
    )


def other_score(logits: Tensor, target: Tensor, statistic: str) -> float:
    """Sums of floored log-probabilities, or of hits; of class indexes or soft labels."""
    total = []
    soft = target.is_floating_point()
    labels = rows(target) if soft else target.flatten().tolist()
    for row, label in zip(rows(logits), labels, strict=True):
        if label == -100:
            continue
        weights = label if soft else [float(c == label) for c in range(len(row))]
        if statistic == "accuracy":
            total.append(float(row.index(max(row)) == weights.index(max(weights))))
        else:
            top = max(row)
            log_sum = top + math.log(math.fsum(math.exp(x - top) for x in row))
            logs = [max(x - log_sum, math.log(1e-8)) for x in row]
            total += [q * each for q, each in zip(weights, logs, strict=True) if q]
    return math.fsum(total)


# --- scores


@pytest.mark.parametrize("modalities", [2, 3, 8])
@pytest.mark.parametrize("rest", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores(
    backend: Backend, modalities: int, rest: tuple[int, ...], dtype: torch.dtype
) -> None:
    shape = (6, 4, *rest)
    logits = [3 * torch.randn(shape).to(backend.device, dtype) for _ in range(modalities)]
    target = torch.randint(4, (6, *rest), device=backend.device)
    target[0] = -100
    scores = contribution_scores(logits, target)
    assert scores.dtype == torch.float32
    assert scores.shape == (modalities,)
    assert scores.tolist() == pytest.approx([hard_score(x, target) for x in logits], rel=2e-6)


# Around every vector width, and where a row no longer belongs to one warp.
@pytest.mark.parametrize("classes", [2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 309, 1000, 1025, 2500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_classes(native: Backend, classes: int, dtype: torch.dtype) -> None:
    logits = [3 * torch.randn(5, classes).to(native.device, dtype) for _ in range(2)]
    hard = torch.tensor([0, classes - 1, classes // 2, 0, 1], device=native.device)
    soft = torch.randn(5, classes).softmax(1).to(native.device, dtype)
    assert contribution_scores(logits, hard).tolist() == pytest.approx(
        [hard_score(x, hard) for x in logits], rel=2e-6
    )
    assert contribution_scores(logits, soft).tolist() == pytest.approx(
        [soft_score(x, soft) for x in logits], rel=2e-6
    )


@pytest.mark.parametrize("batch", [1, 2, 255, 256, 257, 3000])
def test_sizes_of_the_batch(native: Backend, batch: int) -> None:
    logits = [torch.randn(batch, 3, device=native.device) for _ in range(3)]
    target = torch.randint(3, (batch,), device=native.device)
    assert contribution_scores(logits, target).tolist() == pytest.approx(
        [hard_score(x, target) for x in logits], rel=2e-6
    )


@pytest.mark.parametrize("rest", [(), (5,)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_labels(backend: Backend, rest: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = [torch.randn(6, 4, *rest, device=backend.device) for _ in range(2)]
    target = torch.rand(6, 4, *rest).softmax(dim=1).to(backend.device, dtype)
    scores = contribution_scores(logits, target)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([soft_score(x, target) for x in logits], rel=2e-6)


def test_one_hot_labels_score_as_their_classes(backend: Backend) -> None:
    logits = [torch.randn(9, 5, device=backend.device) for _ in range(2)]
    target = torch.randint(5, (9,), device=backend.device)
    hot = nn.functional.one_hot(target, 5).float()
    torch.testing.assert_close(
        contribution_scores(logits, hot), contribution_scores(logits, target), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labels", DTYPES, ids=str)
def test_soft_labels_are_not_rounded(
    backend: Backend, dtype: torch.dtype, labels: torch.dtype
) -> None:
    logits = [torch.randn(6, 4).to(backend.device, dtype) for _ in range(2)]
    target = torch.rand(6, 4).softmax(dim=1).to(backend.device, labels)
    expected = [soft_score(x, target) for x in logits]
    assert contribution_scores(logits, target).tolist() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_any_integer_labels(backend: Backend, dtype: torch.dtype) -> None:
    logits = [torch.randn(5, 3, device=backend.device)]
    target = torch.tensor([0, 1, 2, 1, 0], device=backend.device)
    expected = contribution_scores(logits, target)
    assert torch.equal(contribution_scores(logits, target.to(dtype)), expected)


def test_modalities_may_differ_in_dtype(backend: Backend) -> None:
    logits = [torch.randn(5, 3).to(backend.device, dtype) for dtype in DTYPES]
    target = torch.tensor([0, 1, 2, 1, 0], device=backend.device)
    expected = [hard_score(x, target) for x in logits]
    assert contribution_scores(logits, target).tolist() == pytest.approx(expected, rel=2e-6)
    soft = torch.tensor([[0.25, 0.5, 0.25]] * 5, device=backend.device)  # the same in every type
    expected = [soft_score(x, soft) for x in logits]
    assert contribution_scores(logits, soft).tolist() == pytest.approx(expected, rel=2e-6)


def test_views_of_logits_and_labels(backend: Backend) -> None:
    base = torch.randn(12, 8, device=backend.device)
    labels = torch.randint(4, (6, 2), device=backend.device)[:, 0]
    for logits in (base[::2, ::2], base[3:9, 1:5], base.t()[:4, :6].t(), base[:1, :4].expand(6, 4)):
        expected = hard_score(logits, labels)
        assert contribution_scores([logits], labels).tolist() == pytest.approx([expected], rel=2e-6)


def test_ignored_samples_count_for_nothing(backend: Backend) -> None:
    logits = torch.randn(5, 3, device=backend.device)
    logits[3] = NAN
    target = torch.tensor([0, 1, 2, 1, 0], device=backend.device)
    scores = contribution_scores([logits, logits], target, ignore_index=1)
    expected = hard_score(logits, target, ignore_index=1)
    assert scores.tolist() == pytest.approx([expected] * 2, rel=2e-6)
    everything = torch.full((5,), -100, device=backend.device)
    assert contribution_scores([logits, logits], everything).tolist() == [0.0, 0.0]


def test_ignored_class(backend: Backend) -> None:
    """ignore_index may be a class: its samples are left out."""
    logits = torch.zeros(4, 2, device=backend.device)
    target = torch.tensor([0, 1, 1, 0], device=backend.device)
    assert contribution_scores([logits], target, ignore_index=0).tolist() == [1.0]


def test_empty_batch(backend: Backend) -> None:
    logits = [torch.empty(0, 3, device=backend.device)] * 2
    hard = torch.empty(0, dtype=torch.long, device=backend.device)
    assert contribution_scores(logits, hard).tolist() == [0.0, 0.0]
    assert contribution_scores(logits, logits[0]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [3, 40, 1500])
def test_large_logits(backend: Backend, dtype: torch.dtype, classes: int) -> None:
    logits = torch.full((3, classes), -1e4)
    logits[0, 0] = logits[1, 1] = logits[1, 2] = logits[2, 2] = 1e4
    target = torch.tensor([0, 1, 0], device=backend.device)
    up = logits.to(backend.device, dtype)
    scores = contribution_scores([up, -up], target).tolist()
    others = classes - 1
    assert scores[0] == 1.5
    assert scores[1] == pytest.approx(1 / others, rel=2e-6)


def test_logits_of_minus_infinity(backend: Backend) -> None:
    """Classes that are masked out, among them the true one."""
    logits = torch.tensor([[0.0, 0.0, -INF], [-INF, 0.0, 0.0]], device=backend.device)
    target = torch.tensor([0, 0], device=backend.device)
    assert contribution_scores([logits], target).tolist() == [0.5]


def test_broken_logits_break_their_modality_alone(backend: Backend) -> None:
    fine, broken = torch.zeros(4, 2, device=backend.device), torch.zeros(4, 2)
    broken[2, 0] = NAN
    target = torch.tensor([0, 1, 1, 0], device=backend.device)
    scores = contribution_scores([fine, broken.to(backend.device), fine], target)
    assert scores[[0, 2]].tolist() == [2.0, 2.0]
    assert scores[1].isnan()


def test_scores_have_no_graph(backend: Backend) -> None:
    logits = torch.randn(4, 3, device=backend.device, requires_grad=True)
    target = torch.tensor([0, 1, 2, 0], device=backend.device)
    assert not contribution_scores([logits, 2 * logits], target).requires_grad
    soft = torch.full((4, 3), 1 / 3, device=backend.device, requires_grad=True)
    assert not contribution_scores([logits, logits], soft).requires_grad


# --- ratios


@pytest.mark.parametrize("modalities", [2, 3, 8])
def test_ratios(backend: Backend, modalities: int) -> None:
    scores = 10 * torch.rand(modalities)
    s = scores.tolist()
    expected = [
        statistics.fmean(s[m] / s[j] for j in range(modalities) if j != m)
        for m in range(modalities)
    ]
    ratios = discrepancy_ratios(scores.to(backend.device))
    assert ratios.dtype == torch.float32
    assert ratios.tolist() == pytest.approx(expected, rel=1e-6)


def test_ratios_of_zero_scores(backend: Backend) -> None:
    one, zero = torch.tensor([[4.0, 0.0], [0.0, 0.0]], device=backend.device)
    assert discrepancy_ratios(one).tolist() == [INF, 0.0]
    assert discrepancy_ratios(zero).isnan().all()


# --- coefficients


RULES: dict[str, Callable[[float, float], float]] = {
    "cvpr2022": lambda rho, alpha: 1 - math.tanh(alpha * rho) if rho > 1 else 1.0,
    "cvpr2022_excess": lambda rho, alpha: 1 - math.tanh(alpha * (rho - 1)) if rho > 1 else 1.0,
    "tpami2024": lambda rho, alpha: max(0.0, 1 - alpha * math.tanh(rho - 1)) if rho > 1 else 1.0,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.8, 1.5])
def test_rules(backend: Backend, rule: Any, alpha: float) -> None:
    ratios = torch.tensor([0.0, 0.3, 1.0, 1.01, 1.5, 3.0, 40.0])
    expected = [RULES[rule](rho, alpha) for rho in ratios.tolist()]
    coefficients = modulation_coefficients(ratios.to(backend.device), alpha, rule=rule)
    assert coefficients.dtype == torch.float32
    assert coefficients.tolist() == pytest.approx(expected, abs=2e-7)


def test_published_rule_is_the_default_and_jumps_at_one(backend: Backend) -> None:
    above = torch.tensor([1.0, 1.0 + 1e-6], device=backend.device)
    jumps = [modulation_coefficients(above, alpha).tolist() for alpha in (0.1, 0.3, 0.8, 1.5)]
    assert [one for one, _ in jumps] == [1.0] * 4
    assert [other for _, other in jumps] == pytest.approx([0.900, 0.709, 0.336, 0.095], abs=5e-4)


@pytest.mark.parametrize(
    ("rule", "limit"), [("cvpr2022", 0.0), ("cvpr2022_excess", 0.0), ("tpami2024", 0.5)]
)
def test_infinite_and_undefined_ratios(backend: Backend, rule: Any, limit: float) -> None:
    ratios = torch.tensor([INF, 0.0, NAN], device=backend.device)
    assert modulation_coefficients(ratios, 0.5, rule=rule).tolist() == [limit, 1.0, 1.0]
    assert modulation_coefficients(ratios, 0.0, rule=rule).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("modalities", [2, 3, 8])
@pytest.mark.parametrize("rule", RULES)
def test_from_logits_to_coefficients(backend: Backend, modalities: int, rule: Any) -> None:
    logits = [(1 + m) * torch.randn(9, 4, device=backend.device) for m in range(modalities)]
    target = torch.randint(4, (9,), device=backend.device)
    coefficients = modulation_coefficients(
        discrepancy_ratios(contribution_scores(logits, target)), 0.7, rule=rule
    )
    scores = [hard_score(each, target) for each in logits]
    expected = []
    for m in range(modalities):
        rho = statistics.fmean(scores[m] / scores[j] for j in range(modalities) if j != m)
        expected.append(RULES[rule](rho, 0.7))
    assert coefficients.tolist() == pytest.approx(expected, abs=1e-6)
    assert min(expected) < 1


def test_callable_rule(backend: Backend) -> None:
    weight = nn.Parameter(torch.tensor(2.0, device=backend.device))
    ratios = torch.tensor([0.5, 4.0, NAN], device=backend.device)
    coefficients = modulation_coefficients(ratios, 0.5, rule=lambda rho: weight.double() * rho)
    assert coefficients.tolist() == [1.0, 8.0, 1.0]
    assert coefficients.dtype == torch.float32
    assert not coefficients.requires_grad


def test_arguments_are_not_written(backend: Backend) -> None:
    scores = torch.tensor([4.0, 2.0], device=backend.device)
    ratios = discrepancy_ratios(scores)
    modulation_coefficients(ratios, 0.5)
    assert scores.tolist() == [4.0, 2.0]
    assert ratios.tolist() == [2.0, 0.5]


def test_tokens_with_as_many_positions_as_classes(backend: Backend) -> None:
    """``[B, T, C]`` with T == C fits both readings: `class_dim` says which."""
    logits = [torch.randn(2, 3, 3, device=backend.device) for _ in range(2)]
    target = torch.tensor([[0, 1, 2], [2, 2, -100]], device=backend.device)
    moved = [each.transpose(1, 2) for each in logits]
    soft = torch.randn(2, 3, 3, device=backend.device).softmax(2)
    for given, labels in ((target, target), (soft, soft.transpose(1, 2))):
        scores = contribution_scores(logits, given, class_dim=-1)
        assert torch.equal(scores, contribution_scores(moved, labels))
        assert torch.equal(scores, contribution_scores(logits, given, class_dim=2))
    assert not torch.equal(scores, contribution_scores(logits, soft.transpose(1, 2)))
    with pytest.raises(ValueError, match=r"class_dim must be a dimension of .* \(got 3 for shape"):
        contribution_scores(logits, target, class_dim=3)


# --- other statistics, labels of each class


@pytest.mark.parametrize("classes", [2, 15, 16, 17, 40, 1500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(backend: Backend, classes: int, dtype: torch.dtype) -> None:
    logits = [(9 * torch.randn(7, classes)).to(backend.device, dtype) for _ in range(2)]
    logits[1][3] = 0  # all alike: the first counts
    hard = torch.randint(classes, (7,), device=backend.device)
    hard[0], hard[3], hard[5] = -100, 0, logits[0][5].argmax()
    soft = torch.randn(7, classes).softmax(1).to(backend.device, dtype)
    soft[2] = nn.functional.one_hot(logits[0][2].argmax(), classes)
    for target in (hard, soft):
        for statistic in ("log_probability", "accuracy"):
            found = contribution_scores(logits, target, statistic=statistic)  # type: ignore[arg-type]
            expected = [other_score(each, target, statistic) for each in logits]
            assert found.tolist() == pytest.approx(expected, rel=3e-6), statistic
            assert statistic == "log_probability" or max(expected) > 0


@pytest.mark.parametrize("classes", [1, 2, 16, 33, 1100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels_of_each_class(backend: Backend, classes: int, dtype: torch.dtype) -> None:
    logits = [(9 * torch.randn(6, classes)).to(backend.device, dtype) for _ in range(3)]
    logits[0][0, 0] = -300.0
    target = (torch.rand(6, classes) > 0.6).to(backend.device, dtype)
    target[0, 0] = 1
    for statistic in ("probability", "log_probability", "accuracy"):
        found = contribution_scores(logits, target, multi_label=True, statistic=statistic)  # type: ignore[arg-type]
        expected = [multi_label_score(each, target, statistic) for each in logits]
        assert found.tolist() == pytest.approx(expected, rel=3e-6), statistic


def test_a_single_logit_and_two_classes_say_the_same(backend: Backend) -> None:
    x = torch.randn(9, 1, device=backend.device)
    label = (torch.rand(9, 1, device=backend.device) > 0.5).float()
    two = torch.cat([torch.zeros_like(x), x], dim=1)
    expected = contribution_scores([two, -two], label.flatten().long())
    found = contribution_scores([x, -x], label, multi_label=True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_labels_of_each_class_of_tokens(backend: Backend) -> None:
    logits = [torch.randn(2, 5, 3, device=backend.device) for _ in range(2)]
    target = (torch.rand(2, 5, 3, device=backend.device) > 0.5).float()
    found = contribution_scores(logits, target, class_dim=-1, multi_label=True)
    flat = [each.flatten(0, 1) for each in logits]
    assert torch.equal(found, contribution_scores(flat, target.flatten(0, 1), multi_label=True))


def test_zeros_and_ones_are_not_guessed_to_be_labels_of_each_class(backend: Backend) -> None:
    logits = [torch.randn(3, 4, device=backend.device)] * 2
    target = torch.eye(4, device=backend.device)[:3]  # may be either
    found = contribution_scores(logits, target)
    assert not torch.allclose(found, contribution_scores(logits, target, multi_label=True))


@pytest.mark.parametrize("statistic", ["probability", "log_probability", "accuracy"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_nan_is_no_hit_and_no_number(backend: Backend, statistic: Any, multi_label: bool) -> None:
    logits = torch.zeros(2, 20, device=backend.device)
    logits[0, 19] = NAN
    logits[1, 19] = 1.0
    target = torch.full((2,), 19, device=backend.device)
    given = nn.functional.one_hot(target, 20).float() if multi_label else target
    found = contribution_scores(
        [logits, logits[1:].expand(2, 20)], given, multi_label=multi_label, statistic=statistic
    )
    if statistic != "accuracy":
        assert found.isnan().tolist() == [True, False]
    else:
        # Of twenty labels each, 0 counts as false.
        assert found.tolist() == pytest.approx([1 + 0.95, 2.0] if multi_label else [1.0, 2.0])


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.tensor([[0, 1]]), TypeError, "target must be floating point, 0 or 1 for each label"),
        (torch.tensor([[0.0, 1.5]]), ValueError, "target must be from 0 to 1 for each label"),
        (torch.tensor([[0.0, NAN]]), ValueError, "target must be from 0 to 1 for each label"),
        (torch.tensor([1.0]), ValueError, r"target must have shape \[1, 2\]"),
    ],
)
def test_bad_labels_of_each_class(
    backend: Backend, target: Tensor, error: type[Exception], message: str
) -> None:
    logits = [torch.zeros(1, 2, device=backend.device)] * 2
    if target.isnan().any() and backend.device.type != "cpu":
        pytest.skip("not read there")
    with pytest.raises(error, match=rf"^contribution_scores: {message}.*\(got"):
        contribution_scores(logits, target.to(backend.device), multi_label=True)
    with pytest.raises(ValueError, match="must be of at least two classes; for a single logit"):
        contribution_scores([logits[0][:, :1]], torch.zeros(1).long().to(backend.device))
    with pytest.raises(ValueError, match=r"statistic must be one of probability, .*got 'mean'"):
        contribution_scores(logits, torch.zeros(1).long(), statistic="mean")  # type: ignore[arg-type]


def test_the_end_of_the_memory_is_not_passed(native: Backend) -> None:
    """The last rows of a matrix, in memory that ends there; under sanitizers this would show."""
    for batch, classes in ((1, 3), (2, 17), (5, 31), (3, 310)):
        logits = [torch.randn(batch, classes).to(native.device) for _ in range(2)]
        target = torch.full((batch,), classes - 1, device=native.device)
        expected = [hard_score(each, target) for each in logits]
        assert contribution_scores(logits, target).tolist() == pytest.approx(expected, rel=2e-6)
