"""Optimizers for gradients that a method has modulated."""

from __future__ import annotations

from mmbal_fast.optim._adamw import AdamW

__all__ = ["AdamW"]
