"""The methods: one file for each."""

from __future__ import annotations

from mmbal_fast.methods.gradient_blending import GradientBlending, SuperEpoch
from mmbal_fast.methods.greedy_balancing import GreedyBalancing, GreedyLog, GreedyRecord
from mmbal_fast.methods.ogm_ge import OGMGE

__all__ = [
    "OGMGE",
    "GradientBlending",
    "GreedyBalancing",
    "GreedyLog",
    "GreedyRecord",
    "SuperEpoch",
]
