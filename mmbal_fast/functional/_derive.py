"""Ratios and coefficients from scores, and what is remembered of them."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mmbal_fast import reference
from mmbal_fast.functional import _checks
from mmbal_fast.functional._operation import Operation

RULE_CODES = {
    "none": 0,
    "cvpr2022": 1,
    "cvpr2022_excess": 2,
    "tpami2024": 3,
    "agm": 4,
    "mlb": 5,
    "metric": 6,
}
"""As in csrc/math/modulation.h."""


def _native(
    native: ModuleType,
    state: Tensor,
    totals: Tensor | None,
    past: Tensor | None,
    steps: Tensor | None,
    ratios: bool,
    alpha: float | Tensor,
    beta: float | Tensor,
    rule: str,
) -> None:
    native.derive_(
        state,
        totals,
        past,
        steps,
        ratios,
        _checks.number("derive_", "alpha", alpha),
        _checks.number("derive_", "beta", beta),
        RULE_CODES[rule],
    )


def _reference(
    state: Tensor,
    totals: Tensor | None,
    past: Tensor | None,
    steps: Tensor | None,
    ratios: bool,
    alpha: float | Tensor,
    beta: float | Tensor,
    rule: str,
) -> None:
    alpha = _checks.number("derive_", "alpha", alpha)
    beta = _checks.number("derive_", "beta", beta)
    if totals is not None:
        state[0] = totals[:-1] / totals[-1]
    if rule == "mlb":
        found = reference.mlb_coefficients(state[0], alpha, beta)
    elif rule in ("agm", "metric"):
        if past is None or steps is None:
            raise TypeError("derive_: past must be a tensor for a rule that remembers (got None)")
        if rule == "agm":
            found = reference.agm_coefficients(state[0], past, alpha)
        else:
            before = torch.where(steps > 0, past, torch.nan)
            found = reference.metric_coefficients(state[0], before, alpha)
    else:
        found = reference.discrepancy_ratios(state[0]), state[2]
    if ratios:
        state[1] = found[0]
    if rule in _checks.RULES:
        state[2] = reference.modulation_coefficients(state[1], alpha, rule=rule)  # type: ignore[arg-type]
    else:
        state[2] = found[1]


derive_ = Operation(
    "derive_(Tensor(a!) state, Tensor? totals, Tensor? past, Tensor? steps, bool ratios, "
    "Tensor alpha, Tensor beta, str rule) -> ()",
    device=lambda state, *_: state.device,
    native=_native,
    reference=_reference,
)
"""Ratios (unless they are there) and coefficients of a state from its scores.

Args:
    state: float32 ``[3, M]`` (scores, ratios, coefficients), written in place.
    totals: float32 ``[M + 1]``, sums of samples and their number, whose means become the scores;
        None if the scores are there.
    past: float32 ``[M]``, what the rules "agm" and "metric" remember; see `remember_`.
    steps: int64 ``[]``, of how many steps that is made.
    ratios: whether to compute the ratios.
    alpha: strength of the rule; of "metric" the largest coefficient.
    beta: largest coefficient of "mlb".
    rule: a published rule, or "none" to leave the coefficients alone.
"""


def _remember(
    past: Tensor, steps: Tensor, scores: Tensor, totals: Tensor, counts: Tensor | None, mean: bool
) -> None:
    takes = totals[-1] > 0
    if counts is not None:
        takes = takes & counts
    now = past + (scores - past) / (steps + 1) if mean else scores
    past.copy_(torch.where(takes & scores.isfinite(), now, past))
    steps.add_(takes)


remember_ = Operation(
    "remember_(Tensor(a!) past, Tensor(b!) steps, Tensor scores, Tensor totals, Tensor? counts, "
    "bool mean) -> ()",
    device=lambda past, *_: past.device,
    native=lambda native, *arguments: native.remember_(*arguments),
    reference=_remember,
)
"""Takes the scores of a step into what `derive_` remembers.

Args:
    past: float32 ``[M]``, written in place where the score is finite.
    steps: int64 ``[]``, counted up.
    scores: float32 ``[M]``.
    totals: float32 ``[M + 1]``; nothing is taken if they are of no sample.
    counts: bool ``[]``, or None; nothing is taken if it is False.
    mean: whether ``past`` is the mean of all steps, or the last one's scores.
"""
