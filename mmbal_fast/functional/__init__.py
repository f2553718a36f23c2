"""The operations: validated, stateless, tensors in and out."""

from __future__ import annotations

from mmbal_fast.functional._blended_cross_entropy import blended_cross_entropy
from mmbal_fast.functional._blending_weights import blending_weights
from mmbal_fast.functional._contribution_scores import contribution_scores
from mmbal_fast.functional._discrepancy_ratios import discrepancy_ratios
from mmbal_fast.functional._drop_features import drop_features
from mmbal_fast.functional._gradient_dots import gradient_dots
from mmbal_fast.functional._gradient_moments import gradient_moments
from mmbal_fast.functional._modulate import modulate_
from mmbal_fast.functional._modulation_coefficients import modulation_coefficients
from mmbal_fast.functional._noise_like import noise_like
from mmbal_fast.functional._overfitting_to_generalization_ratio import (
    overfitting_to_generalization_ratio,
)
from mmbal_fast.functional._pareto import pareto_
from mmbal_fast.functional._pull import pull_
from mmbal_fast.functional._squared_norms import squared_norms

__all__ = [
    "blended_cross_entropy",
    "blending_weights",
    "contribution_scores",
    "discrepancy_ratios",
    "drop_features",
    "gradient_dots",
    "gradient_moments",
    "modulate_",
    "modulation_coefficients",
    "noise_like",
    "overfitting_to_generalization_ratio",
    "pareto_",
    "pull_",
    "squared_norms",
]
