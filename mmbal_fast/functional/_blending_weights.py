"""The weights of Gradient-Blending."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from torch import Tensor

from mmbal_fast.functional import _checks
from mmbal_fast.functional._operation import in_graph
from mmbal_fast.functional._overfitting_to_generalization_ratio import checked_losses
from mmbal_fast.reference._blending import FLOOR, normalized, shares


def blending_weights(
    train_before: Tensor | Sequence[float],
    val_before: Tensor | Sequence[float],
    train_after: Tensor | Sequence[float],
    val_after: Tensor | Sequence[float],
    *,
    floor: float = FLOOR,
) -> Tensor:
    """Weights of the heads' losses from what each head gained and overfitted.

    ``w_k = (1 / Z) dG_k / dO_k^2``, ``sum w_k = 1``: Wang, Tran, Feiszli, "What Makes Training
    Multi-Modal Classification Networks Hard?" (CVPR 2020), section 3.2, proposition 1, with ``dO``
    and ``dG`` as in `overfitting_to_generalization_ratio`. Beyond the paper:

    - a head that got worse or stood still (``dG <= 0``), or with a NaN or infinite loss, gets 0;
    - ``|dO|`` counts as at least ``floor`` times the largest ``dG``, so that a head whose gap
      happened not to move does not take all the weight. The floor is relative: multiplying all
      losses by a constant leaves the weights as they are;
    - if that leaves no head, all get ``1 / K``, with a warning if the losses are on the CPU.
      On other devices it is silent, because knowing would take a host read.

    Args:
        train_before: ``[K]``, loss of each head on the training set at the first checkpoint; a mean
            over samples.
        val_before: the same on samples held out from the training set (never the test set).
        train_after: ``[K]`` on the training set at the second checkpoint.
        val_after: ``[K]`` on the held-out samples at the second checkpoint.
        floor: positive; default 0.1. The paper has none. At 0.1 a head with ``dO = 0`` counts at
            most 100 times as much as one whose gap grew as much as its loss fell.

    Returns:
        float64 ``[K]`` on the device of the losses. No host read, except on the CPU.

    Raises:
        ValueError: the four differ in shape or device, are not one-dimensional, K < 2, or ``floor``
            is not a positive number.

    Example:
        >>> from mmbal_fast.functional import blending_weights
        >>> # dG = 0.5, 0.5, -0.2 and dO = 0.1, 0.2, 0.8: dG / dO^2 = 50, 12.5, and none.
        >>> before = [1.0, 1.0, 1.0]
        >>> blending_weights(before, before, [0.4, 0.3, 0.4], [0.5, 0.5, 1.2])
        tensor([0.8000, 0.2000, 0.0000], dtype=torch.float64)
    """
    check_floor("blending_weights", floor)
    losses = checked_losses("blending_weights", train_before, val_before, train_after, val_after)
    raw = shares(*losses, floor=floor)
    # Reading it costs nothing on the CPU, and is a synchronisation elsewhere.
    if raw.device.type == "cpu" and not in_graph() and not bool(raw.any()):
        warnings.warn(
            "blending_weights: no head gained, so all get the same weight (got validation losses "
            f"{losses[1].tolist()} before, {losses[3].tolist()} after)",
            RuntimeWarning,
            stacklevel=2,
        )
    return normalized(raw)


def check_floor(op: str, floor: float) -> None:
    """Refuse a floor that is not a positive number."""
    value = _checks.real(op, "floor", floor)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{op}: floor must be a positive number (got {floor})")
