"""Predict from several modalities, and know when not to trust one."""

from __future__ import annotations

from mmbal_fast.fusion.typicality_gate import TypicalityGate

__all__ = ["TypicalityGate"]
