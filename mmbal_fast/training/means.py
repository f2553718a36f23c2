"""Modulations whose scores are means over samples, and that may remember earlier steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmbal_fast.functional._observe import observe_
from mmbal_fast.training.method import integer, tensor
from mmbal_fast.training.modulation import GradientModulation


class MeanModulation(GradientModulation):
    """A modulation by means over the samples of all micro-batches and ranks.

    Ranks add sums and counts, so that shares of different size weigh what they should. A user's
    own scores, `observe` with ``scores=``, count as one sample.

    A subclass says what is averaged, in `_totals_of`, and how means become ratios and
    coefficients, in `_derive_from_means`. What it remembers of earlier steps are the tensors of
    `_blank_memory`, which follow the device and are part of the state; `_recall` renews them.
    """

    _totals: Tensor
    """float32 ``[M + 1]``: sums over the samples since the last step, and their number."""
    _memory: dict[str, Tensor]

    # ---- what a subclass says ------------------------------------------------------------------

    def _totals_of(self, logits: Sequence[Tensor], target: Tensor, ignore_index: int) -> Tensor:
        """Sums of the batch's samples and their number, float32 ``[M + 1]``.

        Here the softmax probability of the true class. Labels are checked; on CUDA one may be out
        of range all the same, and must do no harm.
        """
        return torch.cat([self._rows[0], number_of(target, ignore_index)])

    @abstractmethod
    def _derive_from_means(self) -> None:
        """Ratios and coefficients, rows 1 and 2, from the means in row 0: NaN without samples."""

    def _blank_memory(self) -> dict[str, Tensor]:
        """What is remembered before the first step, on the CPU: floating or int64 tensors."""
        return {}

    def _recall(self) -> dict[str, Tensor]:
        """The memory after this step, from the means in row 0; only tensors that change."""
        return {}

    # ---- how it is done ------------------------------------------------------------------------

    @torch.no_grad()
    def _measure(
        self, logits: Sequence[Tensor], target: Tensor, *, ignore_index: int, accumulate: bool
    ) -> None:
        # Checks the labels, too.
        observe_(self._rows, logits, target, ignore_index, False, 0.0, "none", self._status)
        self._add_totals(self._totals_of(logits, target, ignore_index), accumulate)

    def _add(self, scores: Tensor) -> None:
        self._add_totals(torch.cat([scores.float(), scores.new_ones(1)]), self._pending_scores)

    def _add_totals(self, totals: Tensor, accumulate: bool) -> None:
        if accumulate:
            self._totals += totals
        else:
            self._totals.copy_(totals)

    def _shared(self) -> Tensor:
        return self._totals

    def _derive(self, *, summed: bool) -> None:
        torch.div(self._totals[:-1], self._totals[-1], out=self._rows[0])
        self._derive_from_means()

    def _remember(self, counts: Tensor | None) -> None:
        seen = self._totals[-1] > 0
        counts = seen if counts is None else counts & seen
        for name, value in self._recall().items():
            kept = self._memory[name]
            kept.copy_(torch.where(counts, value.to(kept.dtype), kept))

    def _state(self) -> dict[str, Any]:
        memory = {
            name: value.clone() if value.is_floating_point() else int(value.item())
            for name, value in self._memory.items()
        }
        return {**super()._state(), **memory}

    def _load(self, op: str, state: Mapping[str, Any]) -> None:
        loaded = {
            name: tensor(op, name, state[name], kept)
            if kept.is_floating_point()
            else torch.full_like(kept, integer(op, name, state[name], 0, 2**63 - 1))
            for name, kept in self._memory.items()
        }
        super()._load(op, state)
        for name, value in loaded.items():
            self._memory[name].copy_(value)

    def _allocate(self, device: torch.device) -> None:
        super()._allocate(device)
        memory = getattr(self, "_memory", None)
        self._memory = {
            name: value.to(device) for name, value in (memory or self._blank_memory()).items()
        }
        self._totals = torch.zeros(len(self.names) + 1, dtype=torch.float32, device=device)


def number_of(target: Tensor, ignore_index: int) -> Tensor:
    """How many samples have a label, float32 ``[1]``."""
    if target.is_floating_point():  # soft labels [B, C, ...]
        count = target.numel() // target.shape[1]
        return torch.full((1,), float(count), dtype=torch.float32, device=target.device)
    return (target != ignore_index).sum(dtype=torch.float32).reshape(1)


def mean_of_others(scores: Tensor) -> Tensor:
    """Of each modality the mean of the others' scores, ``[M]``."""
    count = len(scores)
    return scores.repeat(count, 1).fill_diagonal_(0.0).sum(dim=1) / (count - 1)
