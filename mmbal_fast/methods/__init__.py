"""The methods: one file per paper."""

from __future__ import annotations

from mmbal_fast.methods._blending_estimate import BlendingEstimate, estimate_blending_weights
from mmbal_fast.methods.gradient_blending import GradientBlending, HeadLosses, SuperEpoch
from mmbal_fast.methods.greedy import (
    ConditionalLearningSpeed,
    GreedyBalancing,
    GreedyLog,
    GreedyRecord,
    UtilizationTable,
    conditional_utilization,
)
from mmbal_fast.methods.history import ModulationHistory
from mmbal_fast.methods.ogm_ge import OGMGE, ModulationRecord

__all__ = [
    "OGMGE",
    "BlendingEstimate",
    "ConditionalLearningSpeed",
    "GradientBlending",
    "GreedyBalancing",
    "GreedyLog",
    "GreedyRecord",
    "HeadLosses",
    "ModulationHistory",
    "ModulationRecord",
    "SuperEpoch",
    "UtilizationTable",
    "conditional_utilization",
    "estimate_blending_weights",
]
