"""Rules of other papers than OGM-GE's, in plain PyTorch: from scores to ratios and coefficients."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def agm_coefficients(scores: Tensor, means: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """AGM: how far each modality is ahead now, against how far it has been on average.

    ``r_m = exp(mean over j != m of (u_m - u_j))``, ``k_m = exp(alpha min(tau_m - r_m, 10))`` with
    ``tau`` the same of the means: Li et al., "Boosting Multi-modal Model Performance with Adaptive
    Gradient Modulation" (ICCV 2023), for any number of modalities as in the released code for
    three.

    Args:
        scores: float32 ``[M]``, mean log-probability of the true class in this step.
        means: float32 ``[M]``, its mean over the steps before.
        alpha: strength of the modulation, >= 0.

    Returns:
        Ratios ``r`` and coefficients ``k``, float32 ``[M]``; a coefficient is 1 instead of NaN.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> reference.agm_coefficients(torch.tensor([-0.5, -1.0]), torch.zeros(2), 1.0)
        (tensor([1.6487, 0.6065]), tensor([0.5227, 1.4821]))
    """
    ratios = _lead(scores)
    k = torch.exp(alpha * (_lead(means) - ratios).clamp(max=10.0))
    return ratios, k.masked_fill(k.isnan(), 1.0)


def _lead(scores: Tensor) -> Tensor:
    count = len(scores)
    return torch.exp(count / (count - 1) * (scores - scores.mean()))


@torch.no_grad()
def mlb_coefficients(scores: Tensor, alpha: float, beta: float = 2.0) -> tuple[Tensor, Tensor]:
    """MLB: slower where a modality is ahead, faster where it is behind.

    ``rho_m`` is the score over the mean of the others', ``k_m = 1 + tanh(alpha (1 / rho_m - 1))``,
    where ``rho_m < 1`` with the tanh times ``beta - 1``: Kontras et al., "Improving Multimodal
    Learning with Multi-Loss Gradient Modulation" (BMVC 2024).

    Args:
        scores: float32 ``[M]``, >= 0.
        alpha: strength of the modulation, >= 0.
        beta: largest coefficient, >= 1.

    Returns:
        Ratios ``rho`` and coefficients ``k``, float32 ``[M]``; a coefficient is 1 instead of NaN.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> reference.mlb_coefficients(torch.tensor([2.0, 1.0]), 1.0)
        (tensor([2.0000, 0.5000]), tensor([0.5379, 1.7616]))
    """
    count = len(scores)
    others = scores.repeat(count, 1).fill_diagonal_(0.0).sum(dim=1) / (count - 1)
    behind = others / scores - 1.0
    push = torch.tanh(alpha * behind)
    k = 1.0 + torch.where(behind > 0.0, push * (beta - 1.0), push)
    return scores / others, k.masked_fill(k.isnan(), 1.0)


@torch.no_grad()
def metric_coefficients(metrics: Tensor, before: Tensor, rho: float) -> tuple[Tensor, Tensor]:
    """Slower where the metric has gained most since the last step.

    ``k_m = rho clamp((D - d_m) / D, 0, 1)`` with gains ``d`` and their sum ``D``: after Guo et al.,
    "Classifier-guided Gradient Modulation for Enhanced Multimodal Learning" (NeurIPS 2024), whose
    formula has no clamp.

    Args:
        metrics: float32 ``[M]``, higher is better.
        before: float32 ``[M]``, those of the last step; NaN if there is none.
        rho: largest coefficient, >= 0.

    Returns:
        Gains over their mean and coefficients, float32 ``[M]``; a coefficient is 1 instead of NaN.

    Example:
        >>> import torch
        >>> from mmbal_fast import reference
        >>> gained = torch.tensor([0.5, 0.25, 0.25])
        >>> reference.metric_coefficients(gained, torch.zeros(3), 1.3)
        (tensor([1.5000, 0.7500, 0.7500]), tensor([0.6500, 0.9750, 0.9750]))
    """
    gains = metrics - before
    share = gains / (gains.sum() + 1e-8)
    k = rho * (1.0 - share).clamp(0.0, 1.0)
    return len(gains) * share, k.masked_fill(k.isnan(), 1.0)
