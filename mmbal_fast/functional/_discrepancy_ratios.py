"""How much more each modality contributes than the others."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mmbal_fast import reference
from mmbal_fast.functional import _checks
from mmbal_fast.functional._derive import RULE_CODES
from mmbal_fast.functional._operation import Operation


def discrepancy_ratios(scores: Tensor) -> Tensor:
    """How much more each modality contributes than the others.

    ``rho_m = mean over j != m of S_m / S_j``; for two modalities ``S_0 / S_1`` and ``S_1 / S_0``,
    the discrepancy ratio of OGM-GE (CVPR 2022, section 3.2). The mean is its extension to M
    modalities in Wei et al., "On-the-fly Modulation for Balanced Multimodal Learning" (TPAMI 2024).

    Args:
        scores: ``[M]``, M >= 2, as `contribution_scores` gives them.

    Returns:
        float32 ``[M]``; inf where another modality's score is 0, NaN where both are.

    Raises:
        ValueError: not a vector of two or more floating point scores.

    Example:
        >>> import torch
        >>> from mmbal_fast import functional
        >>> functional.discrepancy_ratios(torch.tensor([6.0, 3.0, 2.0]))
        tensor([2.5000, 1.0000, 0.5000])
    """
    _checks.vector("discrepancy_ratios", "scores", scores, 2)
    return _operation(scores)


def _native(native: ModuleType, scores: Tensor) -> Tensor:
    state = torch.empty((3, len(scores)), dtype=torch.float32, device=scores.device)
    state[0] = scores
    native.derive_(state, None, None, None, True, 0.0, 1.0, RULE_CODES["none"])
    return state[1].clone()


_operation = Operation(
    "discrepancy_ratios(Tensor scores) -> Tensor",
    device=lambda scores: scores.device,
    native=_native,
    reference=reference.discrepancy_ratios,
    fake=lambda scores: scores.new_empty(scores.shape, dtype=torch.float32),
)
