"""Gradient modulation by any metric of each modality, after CGGM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mmbal_fast.functional import _checks
from mmbal_fast.training.means import PastModulation
from mmbal_fast.training.method import Setting
from mmbal_fast.training.modulation import ModulationRecord
from mmbal_fast.training.parameters import Parameters, Select, every

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


class MetricModulation(PastModulation):
    """Slows down the modalities whose metric has gained most since the last step.

    For regression, segmentation and whatever else has a number for each modality, such as the
    accuracy, minus the mean error or the Dice score of its own classifier: higher is better.
    ``k_m = rho clamp((D - d_m) / D, 0, 1)``, where ``d_m`` is the gain of modality m and ``D`` the
    sum of all gains. After Guo et al., "Classifier-guided Gradient Modulation for Enhanced
    Multimodal Learning" (NeurIPS 2024), without its loss on directions; their
    formula has no clamp, and reverses gradients where one metric falls and another rises.

    The first step only remembers the metrics, and modulates nothing.

    Args:
        modalities: for each of the M >= 2 modalities its encoder, as for `OGMGE`.
        rho: largest coefficient, >= 0; default 1.3, which the authors' code has for CMU-MOSI and
            IEMOCAP. They take 1 for BraTS.
        select: which parameters are modulated; default all, as in the authors' code.
        process_group: whose ranks average their metrics, as for `OGMGE`.

    Raises:
        ValueError: as for `OGMGE`.
        TypeError: as for `OGMGE`.

    Example:
        >>> import torch
        >>> import mmbal_fast
        >>> encoders = torch.nn.ModuleDict({name: torch.nn.Linear(4, 3) for name in "abc"})
        >>> for each in encoders.parameters():
        ...     each.grad = torch.ones_like(each)
        >>> balancer = mmbal_fast.MetricModulation(encoders)
        >>> _ = balancer.step(metrics={"a": 0.1, "b": 0.2, "c": 0.3})
        >>> balancer.step(metrics={"a": 0.6, "b": 0.45, "c": 0.55}).coefficients
        tensor([0.6500, 0.9750, 0.9750])
    """

    rho = Setting(_checks.number)
    """Largest coefficient."""

    _statistic = "accuracy"
    _rule, _strength = "metric", "rho"
    _remembers, _mean_of_steps = ("previous", "measured"), False

    def __init__(
        self,
        modalities: Mapping[str, Parameters] | nn.ModuleDict,
        *,
        rho: float = 1.3,
        select: Select | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.rho = rho
        super().__init__(modalities, select=select or every, process_group=process_group)

    def step(
        self,
        logits: Mapping[str, Tensor] | None = None,
        target: Tensor | None = None,
        *,
        metrics: Mapping[str, Tensor | float] | Tensor | None = None,
        ignore_index: int = -100,
        class_dim: int = 1,
        multi_label: bool = False,
        grad_scaler: GradScaler | None = None,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        error_if_nonfinite: bool = False,
    ) -> ModulationRecord:
        """Modulates the gradients in place, as `GradientModulation.step` does.

        Args:
            logits: for classification, of each modality's own classifier: the metric is its
                accuracy. Or None.
            target: as for `observe`; of soft labels the likeliest class counts.
            metrics: instead of logits and target, a number for each modality, ``[M]`` or by name,
                higher is better. Of several `observe` calls with ``scores=`` and of ranks the mean
                is taken.
            ignore_index: as for `observe`.
            class_dim: as for `observe`.
            multi_label: as for `observe`; the metric is the share of labels on the right side of 0.
            grad_scaler: as for `GradientModulation.step`.
            optimizer: as for `GradientModulation.step`.
            error_if_nonfinite: as for `GradientModulation.step`.

        Returns:
            Metrics, gains over the mean gain, and coefficients, on the device.

        Raises:
            RuntimeError: as for `GradientModulation.step`.
            ValueError: as for `GradientModulation.step`; logits and metrics together.
            TypeError: as for `GradientModulation.step`.
        """
        if metrics is not None:
            self.observe(logits, target, scores=metrics)
            logits = target = None
        return super().step(
            logits,
            target,
            ignore_index=ignore_index,
            class_dim=class_dim,
            multi_label=multi_label,
            grad_scaler=grad_scaler,
            optimizer=optimizer,
            error_if_nonfinite=error_if_nonfinite,
        )
