"""Predict from several modalities, and know when not to trust one."""

from __future__ import annotations

from mmbal_fast.fusion.log_linear_pool import LogLinearPool
from mmbal_fast.fusion.shuffle_modality import ShuffleModality, ShuffleRecord
from mmbal_fast.fusion.typicality_gate import TypicalityGate

__all__ = ["LogLinearPool", "ShuffleModality", "ShuffleRecord", "TypicalityGate"]
