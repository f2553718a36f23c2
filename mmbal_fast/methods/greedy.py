"""Balanced multi-modal learning with MMTM networks.

Wu, Jastrzebski, Cho, Geras, "Characterizing and Overcoming the Greedy Nature of Learning in
Multi-modal Deep Neural Networks" (ICML 2022).
"""

from __future__ import annotations

from mmbal_fast.methods._greedy_balancing import GreedyBalancing, GreedyLog, GreedyRecord
from mmbal_fast.methods._greedy_speed import ConditionalLearningSpeed
from mmbal_fast.methods._greedy_utilization import UtilizationTable, conditional_utilization

__all__ = [
    "ConditionalLearningSpeed",
    "GreedyBalancing",
    "GreedyLog",
    "GreedyRecord",
    "UtilizationTable",
    "conditional_utilization",
]
