"""The methods: one file per paper."""

from __future__ import annotations

from mmbal_fast.methods.greedy import (
    ConditionalLearningSpeed,
    GreedyBalancing,
    GreedyLog,
    GreedyRecord,
    UtilizationTable,
    conditional_utilization,
)

__all__ = [
    "ConditionalLearningSpeed",
    "GreedyBalancing",
    "GreedyLog",
    "GreedyRecord",
    "UtilizationTable",
    "conditional_utilization",
]
