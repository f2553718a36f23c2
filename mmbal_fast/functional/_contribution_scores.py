"""How much each modality contributes to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mmbal_fast.functional import _checks
from mmbal_fast.functional._logits import classes_second
from mmbal_fast.functional._observe import native_scores_, reference_scores
from mmbal_fast.functional._operation import Operation
from mmbal_fast.reference import Statistic


def contribution_scores(
    logits: Sequence[Tensor],
    target: Tensor,
    *,
    ignore_index: int = -100,
    class_dim: int = 1,
    multi_label: bool = False,
    statistic: Statistic = "probability",
) -> Tensor:
    """Contribution of each modality: the summed softmax probability of the true class.

    ``S_m = sum_i softmax(logits_m[i])[y_i]``; for soft labels ``q``,
    ``S_m = sum_i sum_c q[i, c] softmax(logits_m[i])[c]``. Peng et al., "Balanced Multimodal
    Learning via On-the-fly Gradient Modulation" (CVPR 2022), section 3.2. One kernel for all
    modalities; nothing is read back to the host.

    With ``multi_label`` each class is a label of its own, true or not, and a sample adds the mean
    over its labels of the probability of what is true,
    ``mean_c (t[i, c] sigmoid(x[i, c]) + (1 - t[i, c]) sigmoid(-x[i, c]))``. One class is enough:
    that is binary classification from one logit.

    Args:
        logits: M tensors ``[B, C]`` or ``[B, C, ...]``, floating point; one per modality. C >= 2,
            or C >= 1 with ``multi_label``.
        target: class indexes, integer, ``[B]`` or ``[B, ...]``; or soft labels, floating point, of
            the shape of the logits; with ``multi_label`` 0 or 1 (or between) of that shape,
            floating point.
        ignore_index: samples with this label add nothing; default -100, as in
            ``torch.nn.functional.cross_entropy``. Not used for soft labels.
        class_dim: dimension of the classes in logits and soft labels; default 1, as in
            ``torch.nn.functional.cross_entropy``. -1 for token logits ``[B, T, C]``.
        multi_label: whether ``target`` says of each class by itself if it is true; default False.
            Never guessed: 0 and 1 may also be a distribution.
        statistic: what a sample adds: the ``"probability"`` of what is true, default; its
            logarithm, ``"log_probability"``, from log 1e-8 on, as AGM has it; or ``"accuracy"``, 1
            if it is the likeliest, of equal ones the first (of multi-label samples the share of
            labels on the right side of 0).

    Returns:
        float32 ``[M]`` without autograd graph, 0 for an empty batch.

    Raises:
        ValueError: no logits, or shapes or devices that do not fit together; a single class without
            ``multi_label``; an unknown statistic; soft labels that are no distribution or, with
            ``multi_label``, not from 0 to 1, on the CPU (elsewhere they are not read).
        TypeError: logits that are not floating point, labels that are neither integer nor floating,
            or not floating with ``multi_label``.
        IndexError: a label outside ``[0, C)`` that is not ``ignore_index``, on the CPU. On CUDA
            such a sample adds nothing.

    Example:
        >>> import torch
        >>> from mmbal_fast import functional
        >>> confident, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> functional.contribution_scores([confident, unsure], torch.tensor([0]))
        tensor([0.9999, 0.5000])
        >>> tags = torch.tensor([[1.0, 0.0]])  # the first is true, the second is not
        >>> functional.contribution_scores([confident, unsure], tags, multi_label=True)
        tensor([0.7499, 0.5000])
    """
    op = "contribution_scores"
    logits, target = classes_second(op, logits, target, class_dim)
    if not isinstance(target, Tensor):
        _checks.batch(op, logits, target, multi_label=multi_label)
    ignore_index = _checks.word(op, "ignore_index", ignore_index)
    return _operation(
        logits, target, multi_label, ignore_index, _checks.statistic_name(op, statistic)
    )


def _native(
    native: ModuleType,
    logits: Sequence[Tensor],
    target: Tensor,
    multi_label: bool,
    ignore_index: int,
    statistic: str,
) -> Tensor:
    scores = torch.empty(len(logits), dtype=torch.float32, device=target.device)
    native_scores_(
        native, scores, None, None, None, logits, target, multi_label, ignore_index, False,
        statistic, 0.0, 1.0, "none", None,
    )  # fmt: skip
    return scores


_operation = Operation(
    "contribution_scores(Tensor[] logits, Tensor target, bool multi_label, int ignore_index, "
    "str statistic) -> Tensor",
    device=lambda logits, target, *_: target.device,
    native=_native,
    reference=reference_scores,
    check=lambda logits, target, multi_label, *_: _checks.batch(
        "contribution_scores", logits, target, multi_label=multi_label
    ),
    fake=lambda logits, target, *_: target.new_empty(len(logits), dtype=torch.float32),
)
