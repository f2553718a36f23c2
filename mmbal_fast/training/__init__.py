"""What a method needs of a training run, written once.

`Method` is the shape of all of them. Its kinds: `GradientModulation` scales gradients in place,
`LossWeighting` weighs losses, `FeatureMethod` acts on features before the fusion.
"""

from __future__ import annotations

from mmbal_fast.training.features import FeatureMethod
from mmbal_fast.training.history import History
from mmbal_fast.training.method import Method, Record, Setting
from mmbal_fast.training.modulation import GradientModulation, ModulationRecord
from mmbal_fast.training.weighting import LossWeighting, WeightingRecord

__all__ = [
    "FeatureMethod",
    "GradientModulation",
    "History",
    "LossWeighting",
    "Method",
    "ModulationRecord",
    "Record",
    "Setting",
    "WeightingRecord",
]
