"""An AdamW that does not normalise a modulation away: no part of the library, for want of a gain.

    python examples/adamw_second_moment.py

OGM (`OGMGE` with ``noise=0``) with this AdamW against OGM-GE with torch's, test accuracy in points,
five seeds, paired, with standard error: views +0.02 ± 0.06, watch +0.65 ± 0.45, omics -0.52 ± 0.87.
On no real data set it gains more than two standard errors. Settings: docs/compare.md; numbers:
benchmarks/results/compare/second_moment.csv. It prints how far a coefficient of 0.25 moves a
weight:

    torch: -0.1000
    second moment unmodulated: -0.0250
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` whose second moment sees the gradients from before a modulation.

    Adam divides its first moment by the root of its second. Where a method scales all gradients of
    an encoder by ``k``, the two cancel, and the update is that of ``k = 1``. Here the first moment
    ``m`` sees the modulated gradient ``g'``, the second ``v`` the gradient ``g`` of the backward
    pass, so that a steady ``k`` scales the update by ``k``, as it does in SGD::

        m <- b1 m + (1 - b1) g',    v <- b2 v + (1 - b2) g^2

    Not from a paper. For modulation without noise, `OGMGE` with ``noise=0``: noise of a tensor's
    deviation is large against the second moment of those elements whose gradients are small, which
    then take steps of many learning rates.

    Call `keep_gradients` between ``backward`` (and ``GradScaler.unscale_``) and the method's step.
    Without it, and wherever a method leaves a gradient as it is, parameters and state are those of
    ``torch.optim.AdamW``, bit for bit. Costs a copy of the gradients in memory, and reading and
    writing them and the first moment once more.

    Arguments, state and parameter groups are those of ``torch.optim.AdamW``, so that each loads the
    other's ``state_dict``.

    Raises:
        ValueError: as torch does, and if the first of ``betas`` is 0.
    """

    _kept: dict[nn.Parameter, Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of `torch.optim.Optimizer`.

        Raises:
            ValueError: the first of ``betas`` is 0, which leaves no first moment to modulate.
        """
        super().add_param_group(param_group)
        if (first := self.param_groups[-1]["betas"][0]) == 0:
            self.param_groups.pop()
            raise ValueError(f"AdamW: betas must have a first above 0 (got {first})")

    @torch.no_grad()
    def keep_gradients(self) -> None:
        """Copies the gradients, for the second moment of the next step."""
        self._kept = {
            each: each.grad.clone()
            for group in self.param_groups
            for each in group["params"]
            if each.grad is not None
        }

    def _init_group(
        self,
        group: dict[str, Any],
        parameters: list[nn.Parameter],
        gradients: list[Tensor],
        first_moments: list[Tensor],
        *others: list[Tensor],
    ) -> Any:
        """Where torch's step collects what it works on: it goes on with the kept gradients."""
        collect: Any = super()._init_group
        out = collect(group, parameters, gradients, first_moments, *others)
        b1 = group["betas"][0]
        skipped = getattr(self, "found_inf", None)  # by a GradScaler
        for index, (parameter, moment) in enumerate(zip(parameters, first_moments, strict=True)):
            kept = self._kept.pop(parameter, None)
            if kept is None:
                continue
            # torch adds (1 - b1) g to b1 m. This makes it (1 - b1) g' in all.
            difference = gradients[index] - kept
            if group["maximize"]:
                difference = -difference
            if skipped is not None:
                difference = torch.where(skipped.bool(), 0.0, difference)
            moment.add_(difference, alpha=(1 - b1) / b1)
            gradients[index] = kept
        return out

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._kept = {}


def main() -> None:
    """One step with each."""
    for name, kind in {"torch": torch.optim.AdamW, "second moment unmodulated": AdamW}.items():
        weight = nn.Parameter(torch.zeros(()))
        optimizer = kind([weight], lr=0.1)
        weight.grad = torch.tensor(4.0)
        if isinstance(optimizer, AdamW):
            optimizer.keep_gradients()
        weight.grad *= 0.25  # as OGM does to a modality that dominates
        optimizer.step()
        print(f"{name}: {weight.item():.4f}")


if __name__ == "__main__":
    main()
