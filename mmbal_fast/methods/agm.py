"""AGM: adaptive gradient modulation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmbal_fast.functional import _checks
from mmbal_fast.training.means import MeanModulation, number_of
from mmbal_fast.training.method import Setting, integer
from mmbal_fast.training.parameters import Parameters, Select, every
from mmbal_fast.training.shards import local_gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FLOOR = 1e-8
_MOST = 10.0


class AGM(MeanModulation):
    """Speeds up the modality that has fallen behind its own past, and slows down the others.

    ``k_m = exp(alpha min(tau_m - r_m, 10))``, where ``r_m`` says how far modality m is ahead of
    the others in this step, and ``tau_m`` how far it has been ahead on average. Li et al.,
    "Boosting Multi-modal Model Performance with Adaptive Gradient Modulation" (ICCV 2023).
    A coefficient may be above 1.

    For a linear fusion of features, with ``head=``, the gradients are those of the paper: of
    encoder m and of the head's columns that meet its features times ``k_m``, of the bias times the
    mean. For any other fusion the logits come from `nn.shapley_logits`, and scaling the encoders
    is an approximation.

    Args:
        modalities: for each of the M >= 2 modalities its encoder, as for `OGMGE`.
        alpha: strength of the modulation, >= 0; default 1, as in the authors' code. They name 1.5
            for CREMA-D.
        head: the linear layer over the concatenated features, in the order of ``modalities``;
            default none, and only encoders are modulated.
        widths: with ``head``, the number of features of each modality; they add up to
            ``head.in_features``.
        select: which parameters of the encoders are modulated; default all, as in the paper.
        process_group: as for `OGMGE`.

    Raises:
        ValueError: as for `OGMGE`; ``head`` without ``widths``, widths for other modalities or of
            another sum, or a head that is part of an encoder.
        TypeError: as for `OGMGE`; a head that is no ``nn.Linear``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import mmbal_fast
        >>> encoders = nn.ModuleDict({"audio": nn.Linear(4, 8), "image": nn.Linear(6, 8)})
        >>> head = nn.Linear(16, 3)
        >>> balancer = mmbal_fast.AGM(encoders, head=head, widths={"audio": 8, "image": 8})
        >>> batch = {"audio": torch.randn(5, 4), "image": torch.randn(5, 6)}
        >>> target = torch.tensor([0, 1, 2, 0, 1])
        >>> features = {name: encoders[name](x) for name, x in batch.items()}
        >>> loss = nn.functional.cross_entropy(head(torch.cat(list(features.values()), 1)), target)
        >>> loss.backward()
        >>> record = balancer.step(mmbal_fast.nn.unimodal_logits(features, head), target)
        >>> bool((record.coefficients < 1).sum() == 1)  # one of the two is ahead
        True
    """

    alpha = Setting(_checks.number)
    """Strength of the modulation."""

    def __init__(
        self,
        modalities: Mapping[str, Parameters] | nn.ModuleDict,
        *,
        alpha: float = 1.0,
        head: nn.Linear | None = None,
        widths: Mapping[str, int] | None = None,
        select: Select | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.alpha = alpha
        super().__init__(modalities, select=select or every, process_group=process_group)
        self._head = head
        self._widths = None if head is None else self._checked_widths(head, widths)

    def _checked_widths(self, head: nn.Linear, widths: Mapping[str, int] | None) -> list[int]:
        op = type(self).__name__
        if not isinstance(head, nn.Linear):
            raise TypeError(f"{op}: head must be an nn.Linear (got {type(head).__name__})")
        if not isinstance(widths, Mapping) or widths.keys() != set(self.names):
            got = list(widths) if isinstance(widths, Mapping) else widths
            raise ValueError(
                f"{op}: head needs widths, the number of features of each of {list(self.names)} "
                f"(got {got})"
            )
        numbers = [integer(op, "widths", widths[name], 1, head.in_features) for name in self.names]
        if sum(numbers) != head.in_features:
            raise ValueError(
                f"{op}: widths must add up to the head's in_features {head.in_features} "
                f"(got {numbers}, sum {sum(numbers)})"
            )
        if any(each is mine for each in head.parameters() for mine in self._groups.parameters):
            raise ValueError(f"{op}: head must belong to no modality (got one of an encoder)")
        return numbers

    def _totals_of(self, logits: Sequence[Tensor], target: Tensor, ignore_index: int) -> Tensor:
        sums = [_log_likelihood(each, target, ignore_index) for each in logits]
        return torch.cat([torch.stack(sums), number_of(target, ignore_index)])

    def _derive_from_means(self) -> None:
        scores, ratios, coefficients = self._rows
        ratios.copy_(_ahead(scores))
        excess = (_ahead(self._memory["means"]) - ratios).clamp(max=_MOST)
        k = torch.exp(self._scalar("alpha") * excess)
        coefficients.copy_(torch.where(k.isnan(), 1.0, k))

    def _blank_memory(self) -> dict[str, Tensor]:
        return {
            "means": torch.zeros(len(self.names), dtype=torch.float32, device="cpu"),
            "averaged": torch.zeros((), dtype=torch.int64, device="cpu"),
        }

    def _recall(self) -> dict[str, Tensor]:
        means, averaged = self._memory["means"], self._memory["averaged"]
        return {
            "means": means + (self._rows[0] - means) / (averaged + 1),
            "averaged": averaged + 1,
        }

    def _scale_shared(self) -> None:
        """The head's columns by their modality's coefficient, its bias by the mean of all."""
        if self._head is None or self._widths is None:
            return
        k = self._rows[2]
        weight, bias = local_gradient(self._head.weight), None
        if self._head.bias is not None:
            bias = local_gradient(self._head.bias)
        if weight is not None:
            columns = zip(torch.split(weight, self._widths, dim=1), k.unbind(), strict=True)
            for part, coefficient in columns:
                part.mul_(coefficient)
        if bias is not None:
            bias.mul_(k.mean())


def _ahead(scores: Tensor) -> Tensor:
    """How far each modality is ahead: ``exp`` of its mean lead over the others, ``[M]``."""
    count = len(scores)
    return torch.exp(count / (count - 1) * (scores - scores.mean()))


def _log_likelihood(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Sum over the samples of the log-probability of the true class, float32 ``[]``."""
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    floor = math.log(_FLOOR)
    logs = logits.detach().to(exact).log_softmax(dim=1).clamp(min=floor)
    if target.is_floating_point():
        return (logs * target).sum().float()
    label = target.long().clamp(0, logits.shape[1] - 1).unsqueeze(1)
    found = logs.gather(1, label).squeeze(1)
    return found.masked_fill(target == ignore_index, 0.0).sum().float()
