"""How much each modality contributes to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mmbal_fast import reference
from mmbal_fast.functional import _checks
from mmbal_fast.functional._logits import check_labels, classes_second, plain
from mmbal_fast.functional._observe import native_scores_
from mmbal_fast.functional._operation import Operation


def contribution_scores(
    logits: Sequence[Tensor], target: Tensor, *, ignore_index: int = -100, class_dim: int = 1
) -> Tensor:
    """Contribution of each modality: the summed softmax probability of the true class.

    ``S_m = sum_i softmax(logits_m[i])[y_i]``; for soft labels ``q``,
    ``S_m = sum_i sum_c q[i, c] softmax(logits_m[i])[c]``. Peng et al., "Balanced Multimodal
    Learning via On-the-fly Gradient Modulation" (CVPR 2022), section 3.2. One kernel for all
    modalities; nothing is read back to the host.

    Args:
        logits: M tensors ``[B, C]`` or ``[B, C, ...]``, C >= 2, floating point; one per modality.
        target: class indexes, integer, ``[B]`` or ``[B, ...]``; or soft labels, floating point, of
            the shape of the logits.
        ignore_index: samples with this label add nothing; default -100, as in
            ``torch.nn.functional.cross_entropy``. Not used for soft labels.
        class_dim: dimension of the classes in logits and soft labels; default 1, as in
            ``torch.nn.functional.cross_entropy``. -1 for token logits ``[B, T, C]``.

    Returns:
        float32 ``[M]`` without autograd graph, 0 for an empty batch.

    Raises:
        ValueError: no logits, or shapes or devices that do not fit together; a single class; soft
            labels that are no distribution, on the CPU (elsewhere they are not read).
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
    logits, target = classes_second("contribution_scores", logits, target, class_dim)
    _checks.batch("contribution_scores", logits, target)
    return _operation(logits, target, ignore_index)


def _native(
    native: ModuleType, logits: Sequence[Tensor], target: Tensor, ignore_index: int
) -> Tensor:
    state = torch.empty((3, len(logits)), dtype=torch.float32, device=target.device)
    native_scores_(native, state, logits, target, ignore_index, False, 0.0, "none", None)
    return state[0]


def _reference(logits: Sequence[Tensor], target: Tensor, ignore_index: int) -> Tensor:
    check_labels("contribution_scores", logits, target, ignore_index)
    return reference.contribution_scores(
        [plain(each) for each in logits], plain(target), ignore_index=ignore_index
    )


_operation = Operation(
    "contribution_scores(Tensor[] logits, Tensor target, int ignore_index) -> Tensor",
    device=lambda logits, target, _: target.device,
    native=_native,
    reference=_reference,
    fake=lambda logits, target, _: target.new_empty(len(logits), dtype=torch.float32),
)
