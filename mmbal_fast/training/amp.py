"""Unscaling by `torch.amp.GradScaler`, by itself or in the pass that modulates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer


def as_optimizers(
    op: str, scaler: GradScaler, optimizer: Optimizer | Iterable[Optimizer] | None
) -> list[Optimizer]:
    """The optimizers whose steps the scaler may skip, out of their wrappers.

    A scaler knows optimizers by identity. Whether ``scaler.step`` will be given a wrapper, such as
    Accelerate's, or by the wrapper what it wraps, is not known here: both get one state, so that
    what was unscaled is not unscaled again.

    Raises:
        ValueError: there is none.
        TypeError: something else than an optimizer.
    """
    several = isinstance(optimizer, Iterable) and not isinstance(optimizer, Optimizer)
    given: list[Any] = list(optimizer) if several else [optimizer]  # type: ignore[arg-type]
    if given in ([], [None]):
        raise ValueError(
            f"{op}: grad_scaler needs optimizer=, whose gradients it unscales (got {optimizer})"
        )
    states = scaler._per_optimizer_states
    innermost = []
    for each in given:
        chain = [each]
        while isinstance(inner := getattr(chain[-1], "optimizer", None), Optimizer):
            chain.append(inner)
        if not isinstance(chain[-1], Optimizer):
            raise TypeError(
                f"{op}: optimizer must be a torch.optim.Optimizer, a wrapper that has one as "
                f".optimizer, or several (got {type(each).__name__})"
            )
        known = next((other for other in chain if id(other) in states), chain[-1])
        for other in chain:
            states[id(other)] = states[id(known)]
        innermost.append(chain[-1])
    return innermost


def unscale_(scaler: GradScaler, optimizers: Sequence[Optimizer]) -> None:
    """`GradScaler.unscale_` where that was not done since the last update."""
    for optimizer in optimizers:
        if scaler._per_optimizer_states[id(optimizer)]["stage"] is not OptState.UNSCALED:
            scaler.unscale_(optimizer)


def found_inf(scaler: GradScaler, optimizers: Sequence[Optimizer], device: torch.device) -> Tensor:
    """Whether a gradient of these optimizers was not finite, bool ``[]`` on ``device``."""
    found = torch.zeros((), device=device)
    for optimizer in optimizers:
        for each in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            found = found + each.to(device, non_blocking=True)
    return found != 0


@dataclass(frozen=True)
class FusedUnscaling:
    """What `GradScaler.unscale_` does, but for the gradients that a kernel unscales itself."""

    scaler: GradScaler
    optimizer: Optimizer
    rest: list[Tensor]
    """The optimizer's other parameters."""
    inverse_scale: Tensor
    """float32 ``[]``: the kernel's factor."""
    found_inf: Tensor
    """float32 ``[]``: the kernel sets it to 1 where a scaled gradient is not finite."""

    @staticmethod
    def of(
        scaler: GradScaler,
        optimizers: Sequence[Optimizer],
        parameters: Sequence[Tensor],
        grads: Sequence[Tensor | None],
    ) -> FusedUnscaling | None:
        """None where `GradScaler.unscale_` has to do it, or to raise what it raises.

        Args:
            scaler: an enabled scaler.
            optimizers: as for `unscale_`.
            parameters: those that are modulated.
            grads: their gradients, or None where the kernel is not to see them.
        """
        scale = scaler._scale
        if (
            len(optimizers) != 1
            or scale is None
            or type(scaler).unscale_ is not GradScaler.unscale_
            or type(scaler)._unscale_grads_ is not GradScaler._unscale_grads_
            or scaler._per_optimizer_states[id(optimizers[0])]["stage"] is not OptState.READY
        ):
            return None
        fused = {
            id(parameter)
            for parameter, grad in zip(parameters, grads, strict=True)
            if grad is not None
        }
        if any(grad is not None and grad.device != scale.device for grad in grads):
            return None
        own = [each for group in optimizers[0].param_groups for each in group["params"]]
        rest = [parameter for parameter in own if id(parameter) not in fused]
        # Parameters of another optimizer are not to be unscaled here, float16 gradients not at all.
        if not fused or len(own) - len(rest) != len(fused) or _any_half_gradient(own):
            return None
        return FusedUnscaling(
            scaler,
            optimizers[0],
            rest,
            scale.double().reciprocal().float(),
            torch.zeros((), device=scale.device),
        )

    def finish(self) -> None:
        """Unscales the rest and leaves the scaler as `GradScaler.unscale_` would."""
        found = self.scaler._unscale_grads_(
            SimpleNamespace(param_groups=[{"params": self.rest}]),  # type: ignore[arg-type]
            self.inverse_scale,
            self.found_inf,  # copied, so that it holds what the kernel found
            False,
        )
        found.setdefault(self.found_inf.device, self.found_inf)
        state = self.scaler._per_optimizer_states[id(self.optimizer)]
        state["found_inf_per_device"] = found
        state["stage"] = OptState.UNSCALED


def _any_half_gradient(parameters: Iterable[Tensor]) -> bool:
    grads = (parameter.grad for parameter in parameters)
    return any(grad is not None and grad.dtype is torch.float16 for grad in grads)
