"""The operations: validated, stateless, tensors in and out."""

from __future__ import annotations

from mmbal_fast.functional._blending import (
    blended_cross_entropy,
    blending_weights,
    overfitting_to_generalization_ratio,
)
from mmbal_fast.functional._norms import squared_norms

__all__ = [
    "blended_cross_entropy",
    "blending_weights",
    "overfitting_to_generalization_ratio",
    "squared_norms",
]
