"""MLB: multi-loss balanced training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from mmbal_fast.functional import _checks
from mmbal_fast.training.method import Setting
from mmbal_fast.training.modulation import GradientModulation, Kernel
from mmbal_fast.training.parameters import Parameters, Select, every

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _from_one(op: str, name: str, value: float) -> float:
    number = _checks.number(op, name, value)
    if number < 1:
        raise ValueError(f"{op}: {name} must be a number from 1 on (got {value})")
    return number


class MLB(GradientModulation):
    """Slows down the modalities that contribute more than the others, and speeds up those behind.

    ``k_m = 1 + tanh(alpha (1 / rho_m - 1))``, where ``rho_m`` is modality m's score over the mean
    of the others' scores; where ``rho_m < 1`` the tanh is times ``beta - 1``, so that coefficients
    lie between 0 and ``beta``. Kontras et al., "Improving Multimodal Learning with Multi-Loss
    Gradient Modulation" (BMVC 2024). The paper adds the losses of a classifier for each
    modality to the fused one, whose logits are the ones to give: train on
    ``LossWeighting(heads, weights=[1.0] * (M + 1)).loss``.

    Args:
        modalities: for each of the M >= 2 modalities its encoder, as for `OGMGE`; with its own
            classifier's weights, if these are to be scaled as in the authors' code.
        alpha: strength of the modulation, >= 0; 0.8 in the authors' configuration for
            CREMA-D.
        beta: largest coefficient, >= 1; default 2, with which speeding up and slowing down are
            alike, as in the authors' first mode.
        select: which parameters are modulated; default all, as in the authors' code.
        process_group: as for `OGMGE`.

    Raises:
        ValueError: as for `OGMGE`; ``beta`` below 1.
        TypeError: as for `OGMGE`.

    Example:
        >>> import torch
        >>> import mmbal_fast
        >>> encoders = torch.nn.ModuleDict({name: torch.nn.Linear(4, 3) for name in ("a", "b")})
        >>> for each in encoders.parameters():
        ...     each.grad = torch.ones_like(each)
        >>> balancer = mmbal_fast.MLB(encoders, alpha=1.0)
        >>> balancer.observe(scores={"a": 2.0, "b": 1.0})
        >>> balancer.step().coefficients
        tensor([0.5379, 1.7616])
    """

    alpha = Setting(_checks.number)
    """Strength of the modulation."""

    beta = Setting(_from_one)
    """Largest coefficient."""

    def __init__(
        self,
        modalities: Mapping[str, Parameters] | nn.ModuleDict,
        *,
        alpha: float,
        beta: float = 2.0,
        select: Select | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.alpha = alpha
        self.beta = beta
        super().__init__(modalities, select=select or every, process_group=process_group)

    def _kernel(self) -> Kernel:
        return Kernel(alpha=self._scalar("alpha"), beta=self._scalar("beta"), rule="mlb")
