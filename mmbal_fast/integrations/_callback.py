"""What the callbacks of all frameworks do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from mmbal_fast.training.history import History, values_of
from mmbal_fast.training.method import Method, Record

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer


class MethodCallback:
    """Steps the `Method` that the trained module holds.

    Args:
        method: the module's attribute that holds it.
        epochs: enable it in so many first epochs only; None for all.
    """

    def __init__(self, method: str = "balancer", *, epochs: int | None = None) -> None:
        self._attribute = method
        self._epochs = epochs
        self._method: Method | None = None
        self._saved: dict[str, Any] = {}  # to load when the method is known
        self._last: Record | None = None
        self.history: History | None = None
        """Every step so far, once training has begun."""

    def _begin(self, module: nn.Module) -> None:
        method = getattr(module, self._attribute, None)
        if not isinstance(method, Method):
            raise TypeError(
                f"{type(self).__name__}: the module must hold its method as '{self._attribute}' "
                f"(got a {type(module).__name__} with {method!r} there)"
            )
        method._before_training()
        self._method = method
        # Also where there is nothing to load: it forgets what a forward pass by hand observed.
        method.load_state_dict(self._saved or method.state_dict())
        self._saved = {}
        if self.history is None or self.history.names != method.names:
            self.history = History(method.names)

    def _begin_epoch(self, epoch: int) -> None:
        if self._method is not None and self._epochs is not None:
            self._method.enabled = epoch < self._epochs

    @property
    def _pending(self) -> bool:
        """Whether something was observed since the last step."""
        return self._method is not None and self._method._pending

    def _step(self, step: int, scaler: GradScaler | None, optimizer: Optimizer) -> None:
        """Acts before the optimizer's step, and keeps what was measured."""
        if self._method is None or self.history is None:
            return
        record = self._method._before_optimizer(scaler, optimizer)
        if record is not None:
            self.history.record(record, step)
            self._last = record

    def _end_validation(self) -> None:
        if self._method is not None:
            self._method._after_validation()

    def _forget(self) -> None:
        """Drops what a validation before training recorded."""
        if self._method is not None:
            self._method._forget()

    def _refuse_pending(self) -> None:
        """Raises if something was observed that no gradient belongs to."""
        if self._pending:
            raise RuntimeError(
                f"{type(self).__name__}: observe must be called in training only, as in "
                f"`if self.training: self.{self._attribute}.observe(...)` (got it in evaluation)"
            )

    def _values(self) -> dict[str, float]:
        """The last step's numbers by their tags, none if it was not finite. Reads the host."""
        if self._method is None or self._last is None:
            return {}
        return values_of(self._last, self._method.names)

    def _export(self) -> dict[str, Any]:
        return dict(self._saved) if self._method is None else self._method.state_dict()

    def _import(self, state: Mapping[str, Any]) -> None:
        if self._method is None:
            self._saved = dict(state)
        elif state:
            self._method.load_state_dict(state)
