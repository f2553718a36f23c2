"""Methods that act on features, before the fusion."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmbal_fast.functional import _checks
from mmbal_fast.training import ranks
from mmbal_fast.training.method import Method, integer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FeatureMethod(Method):
    """Changes the features of a training batch, at random but resumable.

    A subclass draws from the noise of `functional` with `seed` and the number of the step, which
    it advances by `_advance`; so a run resumes bit for bit from ``{seed, step}``, and every device
    and thread count draws the same.

    Args:
        names: of the M >= 2 modalities.
        seed: 64-bit seed. Nothing is drawn from torch's generators.
        process_group: whose ranks decide together; default all ranks.
    """

    _what = "modalities"

    def __init__(
        self, names: Iterable[str], *, seed: int = 0, process_group: ProcessGroup | None = None
    ) -> None:
        super().__init__(names, process_group=process_group)
        self.seed = _checks.word64(type(self).__name__, "seed", seed)
        """64-bit seed of what is drawn."""
        self._counter = torch.zeros(1, dtype=torch.int64, device="cpu")  # steps done

    @abstractmethod
    def __call__(self, features: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The features to fuse instead, ``[B, ...]`` for each name."""

    def _features(self, op: str, features: Mapping[str, Tensor]) -> list[Tensor]:
        """The features ``[B, ...]`` in the order of the names; the counter follows their device.

        Raises:
            TypeError: no mapping, or a value that is no dense floating point tensor.
            ValueError: other names, or batches of different size or device.
        """
        ordered: list[Tensor] = _checks.by_name(op, "features", features, self.names)
        _checks.features(op, ordered, self.names)
        device = ordered[0].device
        if self._counter.device != device:
            with torch.inference_mode(False):
                self._counter = self._counter.to(device)
        return ordered

    def _advance(self) -> None:
        """Counts a step."""
        self._counter.add_(1)

    def _state(self) -> dict[str, Any]:
        return {"seed": self.seed, "step": int(self._counter.item())}

    def _load(self, op: str, state: Mapping[str, Any]) -> None:
        seed = integer(op, "seed", state["seed"], 0, 2**64 - 1)
        self._counter.fill_(integer(op, "step", state["step"], 0, 2**63 - 1))
        self.seed = seed

    def _in_sync(self) -> dict[str, int]:
        return {"seed": self.seed, "step": int(self._counter.item())}

    def _joined(self, group: ProcessGroup) -> None:
        self.seed = ranks.broadcast_seed(self.seed, group)
