"""The sums that the conditional learning speed is made of."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mmbal_fast import reference
from mmbal_fast.functional._operation import Operation


def _native(
    native: ModuleType, moments: Tensor, membership: Tensor, totals: Tensor, active: Tensor | None
) -> Tensor:
    finite = torch.empty((), dtype=torch.bool, device=totals.device)
    native.accumulate_speeds_(moments, membership, totals, active, finite)
    return finite


accumulate_speeds_ = Operation(
    "accumulate_speeds_(Tensor moments, Tensor membership, Tensor(a!) totals, Tensor? active) "
    "-> Tensor",
    device=lambda moments, *_: moments.device,
    native=_native,
    reference=reference.accumulate_speeds_,
    fake=lambda moments, *_: moments.new_empty((), dtype=torch.bool),
)
"""Adds ``|gradients|^2 / |weights|^2`` of each group to its total, in one launch.

Args:
    moments: float64 ``[2, T, 3]``, as `gradient_moments` gives them: of T weights, and of their
        gradients.
    membership: float64 ``[G, T]``, how often a tensor counts in a group; 0 is not at all.
    totals: float64 ``[G]``, written in place.
    active: bool ``[]`` or None; where false nothing is added.

Returns:
    bool ``[]``: whether all ratios are finite; if not, nothing is added.
"""
