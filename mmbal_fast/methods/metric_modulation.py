"""Gradient modulation by any metric of each modality, after CGGM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmbal_fast.functional import _checks
from mmbal_fast.training.means import MeanModulation, number_of
from mmbal_fast.training.method import Setting
from mmbal_fast.training.modulation import ModulationRecord
from mmbal_fast.training.parameters import Parameters, Select, every

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

_EPSILON = 1e-8


class MetricModulation(MeanModulation):
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
            grad_scaler=grad_scaler,
            optimizer=optimizer,
            error_if_nonfinite=error_if_nonfinite,
        )

    def _totals_of(self, logits: Sequence[Tensor], target: Tensor, ignore_index: int) -> Tensor:
        soft = target.is_floating_point()
        label = target.argmax(dim=1) if soft else target
        hits = [each.argmax(dim=1) == label for each in logits]
        right = torch.stack([each.sum(dtype=torch.float32) for each in hits])
        return torch.cat([right, number_of(target, ignore_index)])

    def _derive_from_means(self) -> None:
        metrics, ratios, coefficients = self._rows
        gains = metrics - self._memory["previous"]
        total = gains.sum() + _EPSILON
        torch.mul(gains / total, len(gains), out=ratios)
        k = self._scalar("rho") * ((total - gains) / total).clamp(0.0, 1.0)
        unknown = k.isnan() | (self._memory["measured"] == 0)
        coefficients.copy_(torch.where(unknown, 1.0, k))

    def _blank_memory(self) -> dict[str, Tensor]:
        return {
            "previous": torch.zeros(len(self.names), dtype=torch.float32, device="cpu"),
            "measured": torch.zeros((), dtype=torch.int64, device="cpu"),
        }

    def _recall(self) -> dict[str, Tensor]:
        return {"previous": self._rows[0], "measured": self._memory["measured"] + 1}
