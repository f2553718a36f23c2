"""The methods: one file for each."""

from __future__ import annotations

from mmbal_fast.methods.agm import AGM
from mmbal_fast.methods.dgl import DGL, DGLRecord
from mmbal_fast.methods.gradient_blending import GradientBlending, SuperEpoch
from mmbal_fast.methods.greedy_balancing import GreedyBalancing, GreedyLog, GreedyRecord
from mmbal_fast.methods.info_reg import InfoReg
from mmbal_fast.methods.metric_modulation import MetricModulation
from mmbal_fast.methods.mlb import MLB
from mmbal_fast.methods.mmpareto import MMPareto, MMParetoRecord
from mmbal_fast.methods.ogm_ge import OGMGE
from mmbal_fast.methods.opm import OPM, Dropped, OPMRecord
from mmbal_fast.methods.relearning import Relearning, RelearningRecord

__all__ = [
    "AGM",
    "DGL",
    "MLB",
    "OGMGE",
    "OPM",
    "DGLRecord",
    "Dropped",
    "GradientBlending",
    "GreedyBalancing",
    "GreedyLog",
    "GreedyRecord",
    "InfoReg",
    "MMPareto",
    "MMParetoRecord",
    "MetricModulation",
    "OPMRecord",
    "Relearning",
    "RelearningRecord",
    "SuperEpoch",
]
