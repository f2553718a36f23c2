"""Modules and helpers that give the logits of each modality."""

from __future__ import annotations

from mmbal_fast.nn._late_fusion import masked_logits, unimodal_logits

__all__ = ["masked_logits", "unimodal_logits"]
