"""Modulations whose scores are means over samples, and that may remember earlier steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmbal_fast.functional._derive import remember_
from mmbal_fast.reference import Statistic
from mmbal_fast.training.method import integer, tensor
from mmbal_fast.training.modulation import GradientModulation, Kernel


class MeanModulation(GradientModulation):
    """A modulation by means over the samples of all micro-batches and ranks.

    Ranks add sums and counts, so that shares of different size weigh what they should. A user's
    own scores, `observe` with ``scores=``, count as one sample.

    A subclass says what of a sample is averaged, in ``_statistic``, and how means become ratios and
    coefficients, in `_derive_from_means`. What it remembers of earlier steps are the tensors of
    `_blank_memory`, which follow the device and are part of the state; `_recall` renews them.
    """

    _statistic: ClassVar[Statistic] = "probability"
    _totals: Tensor
    """float32 ``[M + 1]``: sums over the samples since the last step, and their number."""
    _memory: dict[str, Tensor]

    # ---- what a subclass says ------------------------------------------------------------------

    def _derive_from_means(self) -> None:
        """Ratios and coefficients, rows 1 and 2, from the means in row 0: NaN without samples."""
        raise NotImplementedError

    def _blank_memory(self) -> dict[str, Tensor]:
        """What is remembered before the first step, on the CPU: floating or int64 tensors."""
        return {}

    def _recall(self) -> dict[str, Tensor]:
        """The memory after this step, from the means in row 0; only tensors that change."""
        return {}

    # ---- how it is done ------------------------------------------------------------------------

    def _kernel(self) -> Kernel:
        return Kernel(totals=self._totals, statistic=self._statistic)

    def _add(self, scores: Tensor) -> None:
        totals = torch.cat([scores.float(), scores.new_ones(1, dtype=torch.float32)])
        if self._pending_scores:
            self._totals += totals
        else:
            self._totals.copy_(totals)
        self._derive(summed=True)

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


class PastModulation(MeanModulation):
    """A modulation by means that kernels compare with one number of each modality's past.

    Scores, ratios and coefficients are one launch, the memory another.
    """

    _rule: ClassVar[str]
    """What `functional._derive.derive_` calls the rule."""
    _strength: ClassVar[str]
    """The setting that is its ``alpha``."""
    _remembers: ClassVar[tuple[str, str]]
    """Names of the past and of its number of steps in the state."""
    _mean_of_steps: ClassVar[bool]
    """Whether the past is the mean of all steps, or the last one."""

    def _kernel(self) -> Kernel:
        past, steps = (self._memory[name] for name in self._remembers)
        return Kernel(
            totals=self._totals,
            past=past,
            steps=steps,
            statistic=self._statistic,
            alpha=self._scalar(self._strength),
            rule=self._rule,
        )

    def _derive(self, *, summed: bool) -> None:
        GradientModulation._derive(self, summed=summed)  # by the kernels

    def _remember(self, counts: Tensor | None) -> None:
        past, steps = (self._memory[name] for name in self._remembers)
        remember_(past, steps, self._record.scores, self._totals, counts, self._mean_of_steps)

    def _blank_memory(self) -> dict[str, Tensor]:
        past, steps = self._remembers
        return {
            past: torch.zeros(len(self.names), dtype=torch.float32, device="cpu"),
            steps: torch.zeros((), dtype=torch.int64, device="cpu"),
        }


def mean_of_others(scores: Tensor) -> Tensor:
    """Of each modality the mean of the others' scores, ``[M]``."""
    count = len(scores)
    return scores.repeat(count, 1).fill_diagonal_(0.0).sum(dim=1) / (count - 1)
