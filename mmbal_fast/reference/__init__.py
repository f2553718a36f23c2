"""The operations in plain PyTorch, written to be read; they run on any device."""

from __future__ import annotations

from mmbal_fast.reference._noise import noise_like
from mmbal_fast.reference._ogm import (
    Rule,
    contribution_scores,
    discrepancy_ratios,
    gradient_moments,
    modulate_,
    modulation_coefficients,
)

__all__ = [
    "Rule",
    "contribution_scores",
    "discrepancy_ratios",
    "gradient_moments",
    "modulate_",
    "modulation_coefficients",
    "noise_like",
]
