"""Scores, ratios and coefficients of a batch, in one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mmbal_fast import _backend, reference
from mmbal_fast.functional import _checks
from mmbal_fast.functional._derive import RULE_CODES, derive_
from mmbal_fast.functional._logits import check_labels, plain, rows
from mmbal_fast.functional._operation import Operation


def native_scores_(
    native: ModuleType,
    state: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int,
    accumulate: bool,
    alpha: float | Tensor,
    rule: str,
    status: Tensor | None,
) -> None:
    target = plain(target)
    flat = [rows(plain(each)) for each in logits]
    labels: Tensor | tuple[Tensor, ...]
    if target.is_floating_point():
        soft = rows(target)
        labels = tuple(soft.to(each.dtype) for each in flat)
    else:
        labels = target.to(torch.int64).flatten().contiguous()
    native.scores_(
        flat,
        labels,
        ignore_index,
        state,
        accumulate,
        _checks.number("observe_", "alpha", alpha),
        RULE_CODES[rule],
        status,
        torch.get_num_threads(),
        _backend.workspace,
    )


def _reference(
    state: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int,
    accumulate: bool,
    alpha: float | Tensor,
    rule: str,
    status: Tensor | None,
) -> None:
    check_labels("contribution_scores", logits, target, ignore_index)
    scores = reference.contribution_scores(
        [plain(each) for each in logits], plain(target), ignore_index=ignore_index
    )
    state[0] = state[0] + scores if accumulate else scores
    derive_.run(state, True, alpha, rule)


observe_ = Operation(
    "observe_(Tensor(a!) state, Tensor[] logits, Tensor target, int ignore_index, bool accumulate, "
    "Tensor alpha, str rule, Tensor(b!)? status) -> ()",
    device=lambda state, *_: state.device,
    native=native_scores_,
    reference=_reference,
)
"""Scores of a batch into ``state``, and ratios and coefficients from them.

Args:
    state: float32 ``[3, M]`` (scores, ratios, coefficients), written in place.
    logits: as for `contribution_scores`, checked.
    target: as for `contribution_scores`, checked.
    ignore_index: label of samples that add nothing.
    accumulate: add to the scores that are in ``state``.
    alpha: as for `modulation_coefficients`.
    rule: a published rule, or "none" to leave the coefficients alone.
    status: int32 ``[1]`` or None; bit 2 is set by a label out of range.
"""
