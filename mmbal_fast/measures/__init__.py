"""What is measured of a model and its training, for methods and for people."""

from __future__ import annotations

from mmbal_fast.measures.blending_estimate import BlendingEstimate, estimate_blending_weights
from mmbal_fast.measures.cluster_purity import purity
from mmbal_fast.measures.diagnosis import Diagnosis, diagnose
from mmbal_fast.measures.learning_speed import ConditionalLearningSpeed
from mmbal_fast.measures.utilization import UtilizationTable, conditional_utilization

__all__ = [
    "BlendingEstimate",
    "ConditionalLearningSpeed",
    "Diagnosis",
    "UtilizationTable",
    "conditional_utilization",
    "diagnose",
    "estimate_blending_weights",
    "purity",
]
