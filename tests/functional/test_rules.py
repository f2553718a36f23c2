"""Rules that kernels derive coefficients by, against the reference, and what they remember."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from mmbal_fast import _backend, reference
from mmbal_fast.functional._derive import derive_, remember_

if TYPE_CHECKING:
    from tests.conftest import Backend

NAN, INF = math.nan, math.inf


def derived(
    rule: str, totals: Tensor, past: Tensor, steps: int, alpha: float = 0.7, beta: float = 1.5
) -> Tensor:
    state = torch.full((3, len(past)), 7.0, device=past.device)
    number = torch.tensor(steps, device=past.device)
    derive_(state, totals, past, number, True, alpha, beta, rule)
    return state


def scores_of(rule: str, count: int) -> list[Tensor]:
    """Among them those where a rule has nothing to say."""
    generator = torch.Generator().manual_seed(count)
    found = [torch.rand(count, generator=generator) * 3 for _ in range(5)]
    if rule == "agm":
        found = [-each for each in found] + [torch.tensor([-18.0] + [0.0] * (count - 1))]
    alike, none = torch.full((count,), 0.5), torch.zeros(count)
    one = torch.tensor([1.0] + [0.0] * (count - 1))
    return [*found, alike, none, one, torch.tensor([NAN] + [0.5] * (count - 1))]


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("rule", ["agm", "mlb", "metric"])
def test_kernels_and_reference(native: Backend, rule: str, count: int) -> None:
    past = torch.linspace(-1, 0.7, count)  # gains do not cancel
    seen: set[float] = set()
    for scores in scores_of(rule, count):
        totals = torch.cat([4 * scores, torch.tensor([4.0])])
        for steps in (0, 3):
            with _backend.using(None):
                expected = derived(rule, totals, past, steps)
            found = derived(rule, totals.to(native.device), past.to(native.device), steps).cpu()
            torch.testing.assert_close(found, expected, rtol=3e-6, atol=1e-6, equal_nan=True)
            seen.update(round(each, 3) for each in found[2].tolist())
    assert len(seen) > 7
    # Without a sample the means are undefined, and nothing is scaled.
    empty = torch.zeros(count + 1, device=native.device)
    assert derived(rule, empty, past.to(native.device), 3)[2].tolist() == [1.0] * count


def test_worked_values(backend: Backend) -> None:
    def coefficients(rule: str, scores: list[float], past: list[float], alpha: float) -> list:
        totals = torch.tensor([*scores, 1.0], device=backend.device)
        return derived(
            rule,
            totals,
            torch.tensor(past, dtype=torch.float32, device=backend.device),
            1,
            alpha,
            2.0,
        )[2].tolist()

    assert coefficients("agm", [-0.5, -1.0], [0, 0], 1.0) == pytest.approx(
        [0.522714, 1.482114], rel=1e-5
    )
    cut = coefficients("agm", [-18.0, -0.1], [0.0, -4.0], 1.0)
    assert cut[0] == pytest.approx(math.exp(10), rel=1e-5)
    assert coefficients("mlb", [2, 1], [0, 0], 1.0) == pytest.approx([0.537883, 1.761594], rel=1e-5)
    assert coefficients("metric", [0.5, 0.25, 0.25], [0, 0, 0], 1.3) == pytest.approx(
        [0.65, 0.975, 0.975], rel=1e-5
    )
    assert coefficients("metric", [0.25, -0.125], [0, 0], 1.0) == [0.0, 1.0]  # not reversed


def test_what_is_remembered(backend: Backend) -> None:
    def after(counts: bool | None, samples: float, mean: bool) -> tuple[list[float], int]:
        past = torch.tensor([1.0, 2.0, 3.0], device=backend.device)
        steps = torch.tensor(3, device=backend.device)
        scores = torch.tensor([5.0, NAN, -INF], device=backend.device)
        totals = torch.tensor([0, 0, 0, samples], dtype=torch.float32, device=backend.device)
        flag = None if counts is None else torch.tensor(counts, device=backend.device)
        remember_(past, steps, scores, totals, flag, mean)
        return past.tolist(), int(steps)

    assert after(None, 8, True) == ([2.0, 2.0, 3.0], 4)
    assert after(True, 8, False) == ([5.0, 2.0, 3.0], 4)
    assert after(False, 8, True) == ([1.0, 2.0, 3.0], 3)
    assert after(None, 0, True) == ([1.0, 2.0, 3.0], 3)


def test_a_rule_that_remembers_needs_a_past(backend: Backend) -> None:
    state = torch.ones(3, 2, device=backend.device)
    for rule in ("agm", "metric"):
        with pytest.raises(TypeError, match=r": past must be a tensor for a rule that remembers"):
            derive_(state, None, None, None, True, 0.5, 1.0, rule)
    assert bool((state == 1).all())


def test_references_are_public() -> None:
    ratios, k = reference.mlb_coefficients(torch.tensor([2.0, 1.0, 0.0]), 1.0)
    assert ratios.tolist() == [4.0, 1.0, 0.0]
    assert k[2] == 2.0
