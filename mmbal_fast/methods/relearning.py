"""Diagnosing and re-learning: encoders that memorize are pulled back to where they began."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmbal_fast.functional import _checks
from mmbal_fast.training import Method, Record, Setting
from mmbal_fast.training.method import tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


@dataclass(frozen=True)
class RelearningRecord(Record):
    """What one re-learning found and did, one entry for each modality; on the CPU."""

    gaps: Tensor = field(metadata={"title": "Purity lost on held-out data", "label": "gap"})
    """float64 ``[M]``: purity of the clusters of training features minus that of held-out ones."""
    weights: Tensor = field(
        metadata={"title": "Pulled back by", "label": "weight of the first weights", "from": 0.0}
    )
    """float64 ``[M]``: ``tanh(strength |gap|)``, the weight of the weights at the beginning."""


class Relearning(Method):
    """Pulls each encoder back to its first weights, by how much its features only fit training.

    Wei, Li, Feng, Hu, "Diagnosing and Re-learning for Balanced Multimodal Learning" (ECCV 2024).
    Every few epochs, with the purity ``P`` of k-means clusters of an encoder's features::

        w_m     = tanh(strength |P_train - P_held_out|)
        theta_m <- w_m theta_m(0) + (1 - w_m) theta_m

    `purity` diagnoses, `step` re-learns. The weights at the beginning are kept: one more set of the
    encoders' parameters, and part of the state.

    Where the released code differs: it leaves the running statistics of batch norm and the
    optimizer's state as they are. Here buffers of floating point are pulled back with the
    parameters, and the optimizer's state of an encoder's parameters, if `step` is given the
    optimizer, is scaled by ``1 - w_m``: momentum of the weights that are gone would carry the
    encoder back at once. Its purity rewrites labels in place, and is wrong where they are not
    0 to K - 1.

    Costs nothing in a step of training. `purity` runs scikit-learn's k-means on the host, seconds
    for 10,000 samples of 512 features; `step` reads and writes the parameters once.

    Args:
        encoders: for each of the M >= 2 modalities its module, with the weights it begins with.
        strength: ``lambda``, from 0 on; default 3, of the authors' code.
        process_group: not used: give all ranks the same gaps.

    Raises:
        ValueError: fewer than two modalities, one without parameters, ``strength`` negative or NaN.
        TypeError: an encoder that is no module.

    Example:
        >>> import torch
        >>> import mmbal_fast
        >>> encoders = torch.nn.ModuleDict({"audio": torch.nn.Linear(1, 1, bias=False),
        ...                                 "image": torch.nn.Linear(1, 1, bias=False)})
        >>> for encoder in encoders.values():
        ...     _ = torch.nn.init.zeros_(encoder.weight)
        >>> relearning = mmbal_fast.Relearning(encoders)
        >>> for encoder in encoders.values():  # training
        ...     _ = torch.nn.init.ones_(encoder.weight)
        >>> record = relearning.step({"audio": 0.1, "image": 0.0})
        >>> encoders["audio"].weight.item(), encoders["image"].weight.item()
        (0.708687424659729, 1.0)
    """

    last: RelearningRecord | None
    strength = Setting(_checks.number)
    """``lambda``: how much a gap counts."""

    _what = "modalities"

    def __init__(
        self,
        encoders: Mapping[str, nn.Module] | nn.ModuleDict,
        *,
        strength: float = 3.0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        op = type(self).__name__
        _checks.mapping(op, "encoders", encoders, "modules")
        super().__init__(encoders.keys(), process_group=process_group)
        self.strength = strength
        self._encoders: dict[str, nn.Module] = {}
        for name, encoder in encoders.items():
            if not isinstance(encoder, nn.Module):
                raise TypeError(
                    f"{op}: encoders must be modules (got {type(encoder).__name__} for '{name}')"
                )
            if not _pulled(encoder):
                raise ValueError(f"{op}: encoders must have parameters (got none for '{name}')")
            self._encoders[name] = encoder
        self._first: dict[str, dict[str, Tensor]] | None = None
        if not any(each.is_meta for each in self._all().values()):
            self.remember()

    @torch.no_grad()
    def remember(self) -> None:
        """Takes the weights of now as those to go back to; for models made on the meta device.

        The constructor does it where the weights are real.

        Raises:
            RuntimeError: a weight is on the meta device.
        """
        for name, each in self._all().items():
            if each.is_meta:
                raise RuntimeError(
                    f"{type(self).__name__}.remember: weights must be real (got meta for '{name}')"
                )
        self._first = {
            name: {key: each.detach().clone() for key, each in _pulled(encoder).items()}
            for name, encoder in self._encoders.items()
        }

    @torch.no_grad()
    def step(
        self, gaps: Mapping[str, float], *, optimizer: Optimizer | None = None
    ) -> RelearningRecord:
        """Re-learns. Call it between two epochs, on all ranks with the same gaps.

        Args:
            gaps: for each modality ``purity(train) - purity(held out)``.
            optimizer: whose state of the encoders' parameters is scaled with them.

        Returns:
            Gaps and weights. While `enabled` is False nothing is written and the weights are 0.

        Raises:
            ValueError: other names, or a gap that is no finite number.
            RuntimeError: made on the meta device, and `remember` was not called.
        """
        op = f"{type(self).__name__}.step"
        values = [*map(float, _checks.by_name(op, "gaps", gaps, self.names, "numbers"))]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{op}: gaps must be finite (got {values})")
        if self._first is None:
            raise RuntimeError(
                f"{op}: needs remember() first, as the model was made without weights (got none)"
            )
        weights = [math.tanh(self.strength * abs(gap)) * self.enabled for gap in values]
        for name, weight in zip(self.names, weights, strict=True):
            if weight == 0:
                continue  # the very bits
            now = _pulled(self._encoders[name])
            before = self._first[name]
            shared = [key for key in now if key in before and now[key].shape == before[key].shape]
            torch._foreach_lerp_(
                [now[key] for key in shared],
                [before[key].to(now[key]) for key in shared],
                weight,
            )
            for parameter in self._encoders[name].parameters() if optimizer is not None else ():
                for key, value in optimizer.state.get(parameter, {}).items():  # type: ignore[union-attr]
                    if isinstance(value, Tensor) and key != "step" and value.is_floating_point():
                        value *= 1.0 - weight
        self.last = RelearningRecord(
            torch.tensor(values, dtype=torch.float64, device="cpu"),
            torch.tensor(weights, dtype=torch.float64, device="cpu"),
        )
        return self.last

    def _all(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": each
            for name, encoder in self._encoders.items()
            for key, each in _pulled(encoder).items()
        }

    def _state(self) -> dict[str, Any]:
        first = self._first or {name: {} for name in self.names}
        return {"first": {name: dict(first[name]) for name in self.names}}

    def _load(self, op: str, state: Mapping[str, Any]) -> None:
        first = state["first"]
        if not isinstance(first, Mapping) or set(first) != set(self.names):
            raise ValueError(f"{op}: first must hold {list(self.names)} (got {first!r:.80})")
        loaded: dict[str, dict[str, Tensor]] = {}
        for name, encoder in self._encoders.items():
            now = _pulled(encoder)
            if not isinstance(first[name], Mapping) or set(first[name]) != set(now):
                raise ValueError(
                    f"{op}: first must hold the weights of '{name}', {sorted(now)} "
                    f"(got {first[name]!r:.80})"
                )
            loaded[name] = {
                key: tensor(op, f"first['{name}.{key}']", first[name][key], each)
                for key, each in now.items()
            }
        self._first = loaded


def _pulled(encoder: nn.Module) -> dict[str, Tensor]:
    """Parameters, and buffers of floating point."""
    return dict(encoder.named_parameters()) | {
        name: each for name, each in encoder.named_buffers() if each.is_floating_point()
    }
