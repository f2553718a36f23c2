"""Ratios and coefficients from scores that are summed over ranks."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from mmbal_fast import reference
from mmbal_fast.functional import _checks
from mmbal_fast.functional._operation import Operation

RULE_CODES = {"none": 0, "cvpr2022": 1, "cvpr2022_excess": 2, "tpami2024": 3}
"""As in csrc/math/modulation.h."""


def _native(
    native: ModuleType, state: Tensor, ratios: bool, alpha: float | Tensor, rule: str
) -> None:
    native.derive_(state, ratios, _checks.number("derive_", "alpha", alpha), RULE_CODES[rule])


def _reference(state: Tensor, ratios: bool, alpha: float | Tensor, rule: str) -> None:
    if ratios:
        state[1] = reference.discrepancy_ratios(state[0])
    if rule != "none":
        strength = _checks.number("derive_", "alpha", alpha)
        state[2] = reference.modulation_coefficients(state[1], strength, rule=rule)  # type: ignore[arg-type]


derive_ = Operation(
    "derive_(Tensor(a!) state, bool ratios, Tensor alpha, str rule) -> ()",
    device=lambda state, *_: state.device,
    native=_native,
    reference=_reference,
)
"""Ratios (unless they are there) and coefficients of a state from its scores.

Args:
    state: float32 ``[3, M]`` (scores, ratios, coefficients), written in place.
    ratios: whether to compute the ratios.
    alpha: as for `modulation_coefficients`.
    rule: a published rule, or "none" to leave the coefficients alone.
"""
