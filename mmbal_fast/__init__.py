"""Balanced multimodal training for PyTorch."""

from __future__ import annotations

from mmbal_fast import functional, fusion, nn, reference
from mmbal_fast._version import __version__
from mmbal_fast.measures import *  # noqa: F403
from mmbal_fast.measures import __all__ as _measures
from mmbal_fast.methods import *  # noqa: F403
from mmbal_fast.methods import __all__ as _methods
from mmbal_fast.training import *  # noqa: F403
from mmbal_fast.training import __all__ as _training

__all__ = [
    "__version__",
    "functional",
    "fusion",
    "nn",
    "reference",
    *_measures,
    *_methods,
    *_training,
]
