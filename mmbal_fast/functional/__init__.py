"""The operations: validated, stateless, tensors in and out."""

from __future__ import annotations

from mmbal_fast.functional import _ops  # noqa: F401  registers torch.ops.mmbal
from mmbal_fast.functional._blending import (
    blended_cross_entropy,
    blending_weights,
    overfitting_to_generalization_ratio,
)
from mmbal_fast.functional._modulate import modulate_
from mmbal_fast.functional._moments import gradient_moments
from mmbal_fast.functional._noise import noise_like
from mmbal_fast.functional._norms import squared_norms
from mmbal_fast.functional._scores import (
    contribution_scores,
    discrepancy_ratios,
    modulation_coefficients,
)

__all__ = [
    "blended_cross_entropy",
    "blending_weights",
    "contribution_scores",
    "discrepancy_ratios",
    "gradient_moments",
    "modulate_",
    "modulation_coefficients",
    "noise_like",
    "overfitting_to_generalization_ratio",
    "squared_norms",
]
