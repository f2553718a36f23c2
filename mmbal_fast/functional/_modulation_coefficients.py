"""From discrepancy ratios to the factors of the gradients."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mmbal_fast import reference
from mmbal_fast.functional import _checks
from mmbal_fast.functional._derive import RULE_CODES
from mmbal_fast.functional._operation import Operation
from mmbal_fast.reference import Rule


def modulation_coefficients(
    ratios: Tensor, alpha: float | Tensor, *, rule: Rule = "cvpr2022"
) -> Tensor:
    """Factor for the gradients of each modality: 1, or less where the modality dominates.

    Where ``rho_m > 1``, and 1 elsewhere:

    - ``"cvpr2022"``: ``1 - tanh(alpha * rho_m)``, OGM-GE (CVPR 2022), section 3.2;
    - ``"cvpr2022_excess"``: ``1 - tanh(alpha * (rho_m - 1))``, the first release of its code;
    - ``"tpami2024"``: ``max(0, 1 - alpha * tanh(rho_m - 1))``, the journal version (TPAMI 2024).

    Args:
        ratios: ``[M]``, as `discrepancy_ratios` gives them.
        alpha: strength of the modulation, >= 0. The OGM-GE paper's code has 0.8 for CREMA-D and
            0.1 for VGGSound. A number, or one that changes without compiling a graph again, a
            float64 tensor ``[]`` on the CPU. Not used by a callable rule.
        rule: one of the names above, default the published one, or a callable that gets the ratios
            (float32 ``[M]``) and returns the coefficients.

    Returns:
        float32 ``[M]`` without autograd graph; 1 instead of NaN, so that undefined ratios
        throttle nothing.

    Raises:
        ValueError: ``alpha`` is negative or NaN, the rule is unknown, ratios are not a vector, or
            a callable returned another shape.

    Example:
        >>> import torch
        >>> from mmbal_fast import functional
        >>> functional.modulation_coefficients(torch.tensor([2.0, 0.5, float("nan")]), alpha=0.1)
        tensor([0.8026, 1.0000, 1.0000])
    """
    op = "modulation_coefficients"
    alpha = _checks.setting(op, "alpha", alpha)
    _checks.vector(op, "ratios", ratios, 1)
    if callable(rule):
        coefficients = reference.modulation_coefficients(ratios, 0.0, rule=rule)
        if coefficients.shape != ratios.shape:
            raise ValueError(
                f"{op}: the rule must return one coefficient per ratio "
                f"(got shape {list(coefficients.shape)} for {list(ratios.shape)})"
            )
        return coefficients
    return _operation(ratios, alpha, _checks.rule_name(op, rule))


def _native(native: ModuleType, ratios: Tensor, alpha: float | Tensor, rule: str) -> Tensor:
    state = torch.empty((3, len(ratios)), dtype=torch.float32, device=ratios.device)
    state[1] = ratios
    strength = _checks.number("modulation_coefficients", "alpha", alpha)
    native.derive_(state, None, None, None, False, strength, 1.0, RULE_CODES[rule])
    return state[2].clone()


def _reference(ratios: Tensor, alpha: float | Tensor, rule: str) -> Tensor:
    strength = _checks.number("modulation_coefficients", "alpha", alpha)
    return reference.modulation_coefficients(ratios, strength, rule=rule)  # type: ignore[arg-type]


_operation = Operation(
    "modulation_coefficients(Tensor ratios, Tensor alpha, str rule) -> Tensor",
    device=lambda ratios, *_: ratios.device,
    native=_native,
    reference=_reference,
    fake=lambda ratios, *_: ratios.new_empty(ratios.shape, dtype=torch.float32),
)
