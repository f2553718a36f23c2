"""Contribution scores, discrepancy ratios and coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmbal_fast import _backend, reference
from mmbal_fast.functional import _checks
from mmbal_fast.reference import Rule

RULE_CODES = {"none": 0, "cvpr2022": 1, "cvpr2022_excess": 2, "tpami2024": 3}
"""As in csrc/math/modulation.h."""


def contribution_scores(
    logits: Sequence[Tensor], target: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Contribution of each modality: the summed softmax probability of the true class.

    ``S_m = sum_i softmax(logits_m[i])[y_i]``; for soft labels ``q``,
    ``S_m = sum_i sum_c q[i, c] softmax(logits_m[i])[c]``. Peng et al., "Balanced Multimodal
    Learning via On-the-fly Gradient Modulation" (CVPR 2022), section 3.2. One kernel for all
    modalities; nothing is read back to the host.

    Args:
        logits: M tensors ``[B, C]`` or ``[B, C, ...]``, floating point; one per modality.
        target: class indexes, integer, ``[B]`` or ``[B, ...]``; or soft labels, floating point, of
            the shape of the logits.
        ignore_index: samples with this label add nothing; default -100, as in
            ``torch.nn.functional.cross_entropy``. Not used for soft labels.

    Returns:
        float32 ``[M]`` without autograd graph, 0 for an empty batch.

    Raises:
        ValueError: no logits, or shapes or devices that do not fit together.
        TypeError: logits that are not floating point, labels that are neither integer nor floating.
        IndexError: a label outside ``[0, C)`` that is not ``ignore_index``, on the CPU. On CUDA
            such a sample adds nothing.

    Example:
        >>> import torch
        >>> from mmbal_fast import functional
        >>> confident, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> functional.contribution_scores([confident, unsure], torch.tensor([0]))
        tensor([0.9999, 0.5000])
    """
    _checks.batch("contribution_scores", logits, target)
    if torch.compiler.is_compiling():
        scores: Tensor = torch.ops.mmbal.contribution_scores(list(logits), target, ignore_index)
        return scores
    return contribution_scores_eager(logits, target, ignore_index)


def contribution_scores_eager(
    logits: Sequence[Tensor], target: Tensor, ignore_index: int
) -> Tensor:
    """`contribution_scores` on checked arguments."""
    state = torch.empty(3, len(logits), device=target.device)
    observe_eager_(state, logits, target, ignore_index, False, 0.0, "none", None)
    return state[0]


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
    if torch.compiler.is_compiling():
        ratios: Tensor = torch.ops.mmbal.discrepancy_ratios(scores)
        return ratios
    return discrepancy_ratios_eager(scores)


@torch.no_grad()
def discrepancy_ratios_eager(scores: Tensor) -> Tensor:
    """`discrepancy_ratios` on checked arguments."""
    state = torch.empty(3, len(scores), device=scores.device)
    state[0] = scores
    derive_eager_(state, True, 0.0, "none")
    return state[1].clone()


def modulation_coefficients(ratios: Tensor, alpha: float, *, rule: Rule = "cvpr2022") -> Tensor:
    """Factor for the gradients of each modality: 1, or less where the modality dominates.

    Where ``rho_m > 1``, and 1 elsewhere:

    - ``"cvpr2022"``: ``1 - tanh(alpha * rho_m)``, OGM-GE (CVPR 2022), section 3.2;
    - ``"cvpr2022_excess"``: ``1 - tanh(alpha * (rho_m - 1))``, the first release of its code;
    - ``"tpami2024"``: ``max(0, 1 - alpha * tanh(rho_m - 1))``, the journal version (TPAMI 2024).

    Args:
        ratios: ``[M]``, as `discrepancy_ratios` gives them.
        alpha: strength of the modulation, >= 0. The OGM-GE paper's code has 0.8 for CREMA-D and
            0.1 for VGGSound. Not used by a callable rule.
        rule: one of the names above, default the published one, or a callable that gets the ratios
            (float32 ``[M]``) and returns the coefficients.

    Returns:
        float32 ``[M]`` without autograd graph; 1 instead of NaN, so that undefined ratios
        throttle nothing.

    Raises:
        ValueError: ``alpha`` is negative or NaN, the rule is unknown, ratios are not a vector, or
            a callable returned another shape.

    Example:
        >>> import torch
        >>> from mmbal_fast import functional
        >>> functional.modulation_coefficients(torch.tensor([2.0, 0.5, float("nan")]), alpha=0.1)
        tensor([0.8026, 1.0000, 1.0000])
    """
    op = "modulation_coefficients"
    alpha = _checks.number(op, "alpha", alpha)
    _checks.vector(op, "ratios", ratios, 1)
    if callable(rule):
        coefficients = reference.modulation_coefficients(ratios, alpha, rule=rule)
        if coefficients.shape != ratios.shape:
            raise ValueError(
                f"{op}: the rule must return one coefficient per ratio "
                f"(got shape {list(coefficients.shape)} for {list(ratios.shape)})"
            )
        return coefficients
    name = _checks.rule_name(op, rule)
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.mmbal.modulation_coefficients(ratios, alpha, name)
        return result
    return modulation_coefficients_eager(ratios, alpha, name)


@torch.no_grad()
def modulation_coefficients_eager(ratios: Tensor, alpha: float, rule: str) -> Tensor:
    """`modulation_coefficients` on checked arguments."""
    state = torch.empty(3, len(ratios), device=ratios.device)
    state[1] = ratios
    derive_eager_(state, False, alpha, rule)
    return state[2].clone()


@torch.no_grad()
def observe_eager_(
    state: Tensor,
    logits: Sequence[Tensor],
    target: Tensor,
    ignore_index: int,
    accumulate: bool,
    alpha: float,
    rule: str,
    status: Tensor | None,
) -> None:
    """Scores of a batch into ``state`` ``[3, M]`` (scores, ratios, coefficients), in one kernel.

    Args:
        state: float32 ``[3, M]``, written in place.
        logits: as for `contribution_scores`, checked.
        target: as for `contribution_scores`, checked.
        ignore_index: label of samples that add nothing.
        accumulate: add to the scores that are in ``state``.
        alpha: as for `modulation_coefficients`.
        rule: a published rule, or "none" to leave the coefficients alone.
        status: int32 ``[1]`` or None; bit 2 is set by a label out of range.
    """
    native = _backend.runs(state.device)
    if native is None:
        valid = target.is_floating_point() or state.device.type != "cpu"
        if not valid:
            _check_labels(target, logits[0].shape[1], ignore_index)
        scores = reference.contribution_scores(logits, target, ignore_index=ignore_index)
        state[0] = state[0] + scores if accumulate else scores
        derive_eager_(state, True, alpha, rule)
        return
    rows = [_rows(each) for each in logits]
    labels: Tensor | tuple[Tensor, ...]
    if target.is_floating_point():
        flat = _rows(target)
        labels = tuple(flat.to(each.dtype) for each in rows)
    else:
        labels = target.detach().to(torch.int64).contiguous()
    native.scores_(
        rows,
        labels,
        ignore_index,
        state,
        accumulate,
        alpha,
        RULE_CODES[rule],
        status,
        torch.get_num_threads(),
        _backend.workspace,
    )


def derive_eager_(state: Tensor, ratios: bool, alpha: float, rule: str) -> None:
    """Ratios (unless they are there) and coefficients of ``state`` ``[3, M]`` from its scores."""
    native = _backend.runs(state.device)
    if native is not None:
        native.derive_(state, ratios, alpha, RULE_CODES[rule])
        return
    if ratios:
        state[1] = reference.discrepancy_ratios(state[0])
    if rule != "none":
        state[2] = reference.modulation_coefficients(state[1], alpha, rule=rule)  # type: ignore[arg-type]


def _rows(tensor: Tensor) -> Tensor:
    """Class scores as contiguous rows ``[B, C]``."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.ndim > 2:
        tensor = tensor.movedim(1, -1).flatten(0, -2)
    return tensor.contiguous()


def _check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        where = int(wrong.flatten().nonzero()[0])
        raise IndexError(
            f"contribution_scores: target must be in [0, {classes}) or ignore_index "
            f"(got {int(target.flatten()[where])} at {where})"
        )
