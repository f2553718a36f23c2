"""Modules and helpers that give the logits of each modality."""

from __future__ import annotations

from mmbal_fast.nn._late_fusion import masked_logits, shapley_logits, unimodal_logits
from mmbal_fast.nn._mmtm import MMTM
from mmbal_fast.nn._multi_head import MultiHeadLateFusion

__all__ = ["MMTM", "MultiHeadLateFusion", "masked_logits", "shapley_logits", "unimodal_logits"]
