"""AGM: adaptive gradient modulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmbal_fast.functional import _checks
from mmbal_fast.training.means import PastModulation
from mmbal_fast.training.method import Setting, integer
from mmbal_fast.training.parameters import Parameters, Select, every
from mmbal_fast.training.shards import local_gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AGM(PastModulation):
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

    _statistic = "log_probability"
    _rule, _strength = "agm", "alpha"
    _remembers, _mean_of_steps = ("means", "averaged"), True

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
        numbers = [] if head is None else self._checked_widths(head, widths)
        # The modality of each of the head's columns.
        self._columns = torch.tensor(
            [m for m, number in enumerate(numbers) for _ in range(number)],
            dtype=torch.int64,
            device="cpu",
        )

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

    def _scale_shared(self) -> None:
        """The head's columns by their modality's coefficient, its bias by the mean of all."""
        if self._head is None:
            return
        k = self._record.coefficients
        weight, bias = local_gradient(self._head.weight), None
        if self._head.bias is not None:
            bias = local_gradient(self._head.bias)
        if weight is not None:
            self._columns = self._columns.to(k.device)
            weight.mul_(k[self._columns])
        if bias is not None:
            bias.mul_(k.mean())
