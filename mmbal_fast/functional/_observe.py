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

STATISTIC_CODES = {name: code for code, name in enumerate(_checks.STATISTICS)}


def native_scores_(
    native: ModuleType,
    state: Tensor,
    totals: Tensor | None,
    past: Tensor | None,
    steps: Tensor | None,
    logits: Sequence[Tensor],
    target: Tensor,
    multi_label: bool,
    ignore_index: int,
    accumulate: bool,
    statistic: str,
    alpha: float | Tensor,
    beta: float | Tensor,
    rule: str,
    status: Tensor | None,
    op: str = "contribution_scores",
) -> None:
    """Tries the arguments as they are: to check them takes longer than a small batch."""

    def run(given: Sequence[Tensor], labels: object, as_they_are: bool) -> object:
        return native.scores_(
            given,
            labels,
            multi_label,
            ignore_index,
            STATISTIC_CODES[statistic],
            state,
            totals,
            past,
            steps,
            accumulate,
            alpha if type(alpha) is float else _checks.number("observe_", "alpha", alpha),
            beta if type(beta) is float else _checks.number("observe_", "beta", beta),
            RULE_CODES[rule],
            status,
            torch.get_num_threads(),
            _backend.workspace,
            as_they_are,
        )

    if not multi_label and run(logits, target, True) is None:
        return
    _checks.batch(op, logits, target, multi_label=multi_label)
    target = plain(target)
    flat = [rows(plain(each)) for each in logits]
    if target.is_floating_point():
        # Kernels read labels in the type of the logits, in which neither may lose a bit.
        soft = rows(target)
        flat = [each.to(torch.promote_types(each.dtype, soft.dtype)) for each in flat]
        run(flat, tuple(soft.to(each.dtype) for each in flat), False)
    else:
        run(flat, target.to(torch.int64).flatten().contiguous(), False)


def _reference(
    state: Tensor,
    totals: Tensor | None,
    past: Tensor | None,
    steps: Tensor | None,
    logits: Sequence[Tensor],
    target: Tensor,
    multi_label: bool,
    ignore_index: int,
    accumulate: bool,
    statistic: str,
    alpha: float | Tensor,
    beta: float | Tensor,
    rule: str,
    status: Tensor | None,
    op: str = "contribution_scores",
) -> None:
    scores = reference_scores(logits, target, multi_label, ignore_index, statistic, op)
    if totals is None:
        state[0] = state[0] + scores if accumulate else scores
    else:
        new = torch.cat([scores, samples(target, ignore_index)])
        totals.copy_(totals + new if accumulate else new)
    derive_.run(state, totals, past, steps, True, alpha, beta, rule)


def reference_scores(
    logits: Sequence[Tensor],
    target: Tensor,
    multi_label: bool,
    ignore_index: int,
    statistic: str,
    op: str = "contribution_scores",
) -> Tensor:
    """`contribution_scores` in plain PyTorch, with all that it refuses."""
    _checks.batch(op, logits, target, multi_label=multi_label)
    check_labels("contribution_scores", logits, target, ignore_index)
    return reference.contribution_scores(
        [plain(each) for each in logits],
        plain(target),
        ignore_index=ignore_index,
        multi_label=multi_label,
        statistic=statistic,  # type: ignore[arg-type]
    )


def samples(target: Tensor, ignore_index: int) -> Tensor:
    """How many samples have a label, float32 ``[1]``."""
    if target.is_floating_point():  # [B, C, ...]
        count = target.numel() // target.shape[1]
        return torch.full((1,), float(count), dtype=torch.float32, device=target.device)
    return (target != ignore_index).sum(dtype=torch.float32).reshape(1)


observe_ = Operation(
    "observe_(Tensor(a!) state, Tensor(b!)? totals, Tensor? past, Tensor? steps, Tensor[] logits, "
    "Tensor target, bool multi_label, int ignore_index, bool accumulate, str statistic, "
    "Tensor alpha, Tensor beta, str rule, Tensor(c!)? status) -> ()",
    device=lambda state, *_: state.device,
    native=native_scores_,
    reference=_reference,
)
"""Scores of a batch into ``state``, and ratios and coefficients from them.

In a graph the arguments are checked as it runs. Errors call the operation ``op``.

Args:
    state: float32 ``[3, M]`` (scores, ratios, coefficients), written in place.
    totals: float32 ``[M + 1]``, sums of samples and their number, written in place: the scores are
        their means. None for scores that are sums.
    past: as for `derive_`.
    steps: as for `derive_`.
    logits: as for `contribution_scores`.
    target: as for `contribution_scores`.
    multi_label: as for `contribution_scores`.
    ignore_index: label of samples that add nothing.
    accumulate: add to the sums that are there.
    statistic: as for `contribution_scores`.
    alpha: as for `derive_`.
    beta: as for `derive_`.
    rule: a published rule, or "none" to leave the coefficients alone.
    status: int32 ``[1]`` or None; bit 2 is set by a label out of range.
"""
