"""What the callbacks of all frameworks do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmbal_fast.methods.history import ModulationHistory, tags
from mmbal_fast.methods.ogm_ge import OGMGE

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer


class BalancerCallback:
    """Steps the `OGMGE` that the trained module holds.

    Args:
        balancer: the module's attribute that holds it.
        epochs: modulate in so many first epochs only; None for all.
    """

    def __init__(self, balancer: str = "balancer", *, epochs: int | None = None) -> None:
        self._attribute = balancer
        self._epochs = epochs
        self._balancer: OGMGE | None = None
        self._saved: dict[str, Any] = {}  # to load when the balancer is known
        self._stepped = False
        self.history: ModulationHistory | None = None
        """Every step so far, once training has begun."""

    def _begin(self, module: nn.Module) -> None:
        balancer = getattr(module, self._attribute, None)
        if not isinstance(balancer, OGMGE):
            raise TypeError(
                f"{type(self).__name__}: the module must hold its OGMGE as '{self._attribute}' "
                f"(got a {type(module).__name__} with {balancer!r} there)"
            )
        # The framework may have wrapped or sharded the module since the balancer was made.
        balancer.refresh()
        self._balancer = balancer
        # Also where there is nothing to load: it forgets what a forward pass by hand observed.
        balancer.load_state_dict(self._saved or balancer.state_dict())
        self._saved = {}
        if self.history is None or self.history.names != balancer.modality_names:
            self.history = ModulationHistory(balancer.modality_names)

    def _begin_epoch(self, epoch: int) -> None:
        if self._balancer is not None and self._epochs is not None:
            self._balancer.enabled = epoch < self._epochs

    @property
    def _pending(self) -> bool:
        """Whether something was observed since the last step."""
        return self._balancer is not None and self._balancer._pending

    def _step(self, step: int, scaler: GradScaler | None, optimizer: Optimizer) -> None:
        """Modulates, unless nothing was observed because a batch was left out."""
        balancer, history = self._balancer, self.history
        if balancer is None or history is None or (self._stepped and not self._pending):
            return
        history.record(balancer.step(grad_scaler=scaler, optimizer=optimizer), step)
        self._stepped = True

    def _refuse_pending(self) -> None:
        """Raises if something was observed that no gradient belongs to."""
        if self._pending:
            raise RuntimeError(
                f"{type(self).__name__}: observe must be called in training only, as in "
                f"`if self.training: self.{self._attribute}.observe(...)` (got it in evaluation)"
            )

    def _values(self) -> dict[str, float]:
        """The last step's numbers by their tags, none if it was not finite. Reads the host."""
        record = None if self._balancer is None else self._balancer.last
        if self.history is None or record is None:
            return {}
        rows = torch.stack((record.scores, record.ratios, record.coefficients)).flatten()
        *values, skipped = torch.cat((rows, record.skipped[None])).tolist()
        if skipped or not all(map(math.isfinite, values)):
            return {}
        return dict(zip(tags(self.history.names), values, strict=True))

    def _export(self) -> dict[str, Any]:
        return dict(self._saved) if self._balancer is None else self._balancer.state_dict()

    def _import(self, state: Mapping[str, Any]) -> None:
        if self._balancer is None:
            self._saved = dict(state)
        elif state:
            self._balancer.load_state_dict(state)
