"""Balanced multimodal training for PyTorch."""
