"""The gradients of a step: those of `ParameterGroups`, on this rank, as pieces of whole tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmbal_fast.functional._gradient_moments import moments_of
from mmbal_fast.functional._modulate import finite_moments, unscales, update_
from mmbal_fast.training.amp import FusedUnscaling, unscale_
from mmbal_fast.training.parameters import ParameterGroups

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer


class Gradients:
    """What backward left for the selected parameters.

    Args:
        op: who asks, for errors.
        groups: whose gradients; looks for them where the modules hold the parameters now.

    Raises:
        RuntimeError: no parameter has a gradient, although some are trained. Shards may be empty:
            where there are DTensors such a rank takes part. Also for gradients that a
            differential-privacy optimizer is going to replace.
    """

    def __init__(self, op: str, groups: ParameterGroups) -> None:
        groups.follow()
        self._op, self._groups = op, groups
        self._local = groups.gradients()
        for index, grad in enumerate(self._local):
            if grad is not None:
                if hasattr(groups.parameters[index], "grad_sample"):
                    _refuse_per_sample(op, groups, index)
                return
        if groups.shards is None and not groups.frozen():
            raise RuntimeError(
                f"{op}: must come between backward and zero_grad "
                f"(got no gradient on {len(self._local)} parameters)"
            )

    def unscaled_within(
        self, scaler: GradScaler, optimizers: Sequence[Optimizer], device: torch.device
    ) -> FusedUnscaling | None:
        """How `scale_` may unscale in its own pass; else None, and they are unscaled now."""
        fused = None
        if self._groups.shards is None and unscales(device):
            fused = FusedUnscaling.of(scaler, optimizers, self._groups.parameters, self._local)
        if fused is None:
            unscale_(scaler, optimizers)
        return fused

    def moments(self, device: torch.device) -> Tensor:
        """Of the whole tensors, float64 ``[T, 3]``, rows ``(count, mean, M2)``.

        Where no gradient says which device it is, the ranks still sum their zeros. With FSDP2 one
        all-reduce of 3 T float64.
        """
        groups = self._groups
        moments = moments_of(self._local, names=groups.names).to(device)
        if groups.shards is not None:
            groups.shards.complete_(moments)
        return moments

    def require_finite(self, moments: Tensor) -> None:
        """Raises if the moments are not, naming the parameters. Reads the host.

        Raises:
            RuntimeError: a gradient holds NaN or inf.
        """
        finite_moments(self._op, self._local, moments, self._groups.names)

    def scale_(
        self,
        coefficients: Tensor,
        *,
        noise: float | Tensor = 0.0,
        seed: int = 0,
        step: int | Tensor = 0,
        moments: Tensor | None = None,
        status: Tensor | None = None,
        advance: bool = False,
        unscaling: FusedUnscaling | None = None,
    ) -> None:
        """``g <- k_m g + noise * std(g) * z`` in place, see `functional.modulate_`.

        Args:
            coefficients: float32 ``[M]`` on the device of the gradients.
            noise: factor of the noise.
            seed: 64-bit seed of the noise.
            step: step number, or an int64 ``[1]`` on the device.
            moments: as `moments` gives them; measured here if None and no tensor is sharded.
            status: int32 ``[1]`` or None, gets a bit if a gradient is not finite.
            advance: add 1 to the tensor ``step`` at the end.
            unscaling: as `unscaled_within` gave it.
        """
        groups = self._groups
        shards = groups.shards
        if shards is not None and moments is None and noise != 0:
            moments = self.moments(coefficients.device)
        update_(
            self._local if shards is None else shards.split(self._local),
            coefficients,
            groups.modality,
            noise=noise,
            seed=seed,
            step=step,
            tensor_ids=groups.tensor_ids,
            offsets=None if shards is None else shards.offsets,
            moments=moments if shards is None else shards.per_piece(moments),
            status=status,
            advance=advance,
            inverse_scale=None if unscaling is None else unscaling.inverse_scale,
            found_inf=None if unscaling is None else unscaling.found_inf,
            names=groups.piece_names,
        )
        if unscaling is not None:
            unscaling.finish()
        groups.clear_padding_(self._local)


def _refuse_per_sample(op: str, groups: ParameterGroups, index: int) -> None:
    """Refuses gradients that Opacus and its like compute anew from per-sample ones.

    After clipping they mark these as processed, and ``.grad`` is what the optimizer sees.
    """
    parameter: Any = groups.parameters[index]
    samples = parameter.grad_sample
    if samples is None:
        return
    each = samples[-1] if isinstance(samples, list) and samples else samples
    if not getattr(each, "_processed", False):
        raise RuntimeError(
            f"{op}: the gradient of '{groups.names[index]}' must be final, but its optimizer will "
            "compute it anew from per-sample gradients; call this from the optimizer's step hook, "
            "as in optimizer.attach_step_hook(lambda optimizer: method.step(logits, target)) "
            "(got grad_sample)"
        )
