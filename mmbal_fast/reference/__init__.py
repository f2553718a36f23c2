"""The operations in plain PyTorch, written to be read; they run on any device."""

from __future__ import annotations

from mmbal_fast.reference._blending import (
    blended_cross_entropy,
    blending_weights,
    overfitting_to_generalization_ratio,
)
from mmbal_fast.reference._dropping import drop_features
from mmbal_fast.reference._gradient_dots import gradient_dots
from mmbal_fast.reference._noise import noise_like
from mmbal_fast.reference._norms import accumulate_speeds_, squared_norms
from mmbal_fast.reference._ogm import (
    Rule,
    Statistic,
    contribution_scores,
    discrepancy_ratios,
    gradient_moments,
    modulate_,
    modulation_coefficients,
)
from mmbal_fast.reference._pareto import pareto_
from mmbal_fast.reference._pull import pull_
from mmbal_fast.reference._rules import agm_coefficients, metric_coefficients, mlb_coefficients

__all__ = [
    "Rule",
    "Statistic",
    "accumulate_speeds_",
    "agm_coefficients",
    "blended_cross_entropy",
    "blending_weights",
    "contribution_scores",
    "discrepancy_ratios",
    "drop_features",
    "gradient_dots",
    "gradient_moments",
    "metric_coefficients",
    "mlb_coefficients",
    "modulate_",
    "modulation_coefficients",
    "noise_like",
    "overfitting_to_generalization_ratio",
    "pareto_",
    "pull_",
    "squared_norms",
]
