"""Take the label out of the modalities that are learnt too fast, by shuffling their features."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmbal_fast import functional
from mmbal_fast.functional import _checks
from mmbal_fast.training import FeatureMethod, Record, Setting
from mmbal_fast.training.method import tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ShuffleRecord(Record):
    """What a step of `ShuffleModality` did, one entry for each modality."""

    shuffled: Tensor = field(
        metadata={"title": "Shuffled", "label": "share of the batch", "from": 0.0}
    )
    """float32 ``[M]``: share of the samples with the features of another; 0 for the anchor."""


def _probability(op: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} must be a number (got {value!r})")
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be from 0 to 1 (got {value})")
    return float(value)


def _normal_quantile(q: float) -> float:
    """What a standard normal is below with probability q."""
    return NormalDist().inv_cdf(q) if 0 < q < 1 else math.copysign(math.inf, q - 0.5)


class ShuffleModality(FeatureMethod):
    """Shuffle all modalities but the anchor; chosen automatically, it lost 7 points on watch data.

    The automatic choice, the modality that is slowest to learn, is a prior: it says that what is
    learnt fastest is a shortcut. Where it is wrong the method does harm, see ``docs/fusion.md`` for
    that figure. So name the anchor if you know which modality can be trusted, from data like the
    target's. No held-out data are needed.

    Before the fusion, in training, each sample has with probability q the features of another
    sample of the batch in every modality but the anchor, a different one in each::

        z_m[i] <- z_m[partner_m(i)] if c[i],   c[i] ~ Bernoulli(q),   m != anchor

    where ``partner_m`` is a random cycle through the batch, so that nobody is its own partner.
    With that the fused head learns to do without them. Give each modality a loss on its own head as
    well, from the features as they were, so that its encoder learns. Related to permutation as a
    test of a feature's importance (Breiman, "Random Forests", Machine Learning 2001, section 10);
    as a training method it was measured here, not taken from a paper.

    Without a named anchor `observe` the predictions of the modalities' own heads for some epochs,
    two were measured, and then call `choose_anchor`. Until then nothing is shuffled.

    The draws are a function of seed, step, modality and position in the batch: the same on every
    device, other ones on each rank. A step takes M sorts of ``[B]`` and no host read. A batch of
    one stays as it is.

    Args:
        names: of the M >= 2 modalities.
        anchor: the one that is never shuffled; default None, to be chosen by `choose_anchor`.
        probability: ``q``, 0 to 1; default 0.9. With 0.5 colored digits came out alike.
        seed: 64-bit seed; default 0. Nothing is drawn from torch's generators.
        process_group: whose ranks choose together; default all ranks.

    Raises:
        ValueError: fewer than two names, one given twice, an anchor that is none of them, or
            ``probability`` or ``seed`` out of range.
        TypeError: names that are no text, or ``probability`` or ``seed`` of another type.

    Example:
        >>> import torch
        >>> from mmbal_fast.fusion import ShuffleModality
        >>> shuffle = ShuffleModality(["audio", "image"], anchor="image", probability=1.0)
        >>> features = {name: torch.arange(5.0)[:, None] for name in shuffle.names}
        >>> mixed = shuffle(features)
        >>> mixed["image"].flatten().tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]
        >>> sorted(mixed["audio"].flatten().tolist())
        [0.0, 1.0, 2.0, 3.0, 4.0]
        >>> (mixed["audio"] == mixed["image"]).flatten().tolist()
        [False, False, False, False, False]
    """

    last: ShuffleRecord | None
    probability = Setting(_probability)
    """``q``, from 0 to 1."""

    def __init__(
        self,
        names: Iterable[str],
        *,
        anchor: str | None = None,
        probability: float = 0.9,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(names, seed=seed, process_group=process_group)
        self.probability = probability
        self.anchor = anchor
        # Of each modality the summed probability of the label, and the number of samples.
        self._seen = torch.zeros(len(self.names) + 1, dtype=torch.float64, device="cpu")

    @property
    def anchor(self) -> str | None:
        """The modality that is never shuffled, or None as long as none is chosen."""
        return self._anchor

    @anchor.setter
    def anchor(self, anchor: str | None) -> None:
        self._anchor = self._checked_anchor(type(self).__name__, anchor)

    def __call__(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The features to fuse in this step. Call it in training only, once for each step.

        Args:
            features: ``[B, ...]`` of each modality; gradients flow to where the features went.

        Returns:
            As many; the same tensors where nothing is shuffled.

        Raises:
            ValueError: other names, or batches of different size or device.
            TypeError: features that are no floating point tensors.
        """
        ordered = self._features(type(self).__name__, features)
        self._join()
        count, device = ordered[0].shape[0], ordered[0].device
        acts = self.enabled and self._anchor is not None and count > 1
        taken = torch.zeros(count, dtype=torch.bool, device=device)
        result = dict(zip(self.names, ordered, strict=True))
        if acts:
            # Compared and sorted, never computed with: the same choice to the bit everywhere.
            taken = self._draw(count, device, 0) < _normal_quantile(self.probability)
            here = torch.arange(count, device=device)
            for m, name in enumerate(self.names):
                if name != self._anchor:
                    order = self._draw(count, device, m + 1).argsort(stable=True)
                    partner = torch.empty_like(order).scatter_(0, order, order.roll(1))
                    index = torch.where(taken, partner, here)
                    result[name] = result[name].index_select(0, index)
        share = taken.sum().to(torch.float32) / max(count, 1)
        self.last = ShuffleRecord(
            torch.stack([share * (name != self._anchor) for name in self.names])
        )
        if self.enabled:
            self._advance()
        return result

    @torch.no_grad()
    def observe(self, logits: Mapping[str, Tensor], target: Tensor) -> None:
        """Add a batch to what `choose_anchor` decides on. No host read.

        Args:
            logits: ``[B, C]`` of each modality's own head.
            target: class indexes ``[B]``.

        Raises:
            ValueError: other names, or as `functional.contribution_scores` does.
            TypeError: as `functional.contribution_scores` does.
        """
        op = f"{type(self).__name__}.observe"
        ordered = _checks.by_name(op, "logits", logits, self.names)
        scores = functional.contribution_scores(ordered, target)
        self._seen = self._seen.to(scores.device)
        self._seen[:-1] += scores
        self._seen[-1] += len(target)

    def choose_anchor(self) -> str:
        """Make the modality that is slowest to learn the anchor: a prior, see the class.

        That is the one whose own head gave the label the least probability, on average over what
        was observed. A collective call if there are several ranks; reads the host.

        Returns:
            The new `anchor`.

        Raises:
            ValueError: nothing was observed on any rank.
        """
        self._join()
        seen = self._seen.clone()
        if self._group is not None:
            dist.all_reduce(seen, group=self._group)
        if not bool(seen[-1] > 0):
            raise ValueError(
                f"{type(self).__name__}.choose_anchor: predictions must be observed first "
                "(got none)"
            )
        slowest = self.names[int(seen[:-1].argmin())]
        self.anchor = slowest
        return slowest

    def _draw(self, count: int, device: torch.device, stream: int) -> Tensor:
        like = torch.empty(count, dtype=torch.float32, device=device)
        rank = 0 if self._group is None else dist.get_rank(self._group)
        return functional.noise_like(
            like, seed=self.seed, step=self._counter, tensor_id=stream, offset=rank << 32
        )

    def _checked_anchor(self, op: str, anchor: str | None) -> str | None:
        if anchor is not None and anchor not in self.names:
            raise ValueError(f"{op}: anchor must be one of {list(self.names)} (got {anchor!r})")
        return anchor

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "anchor": self._anchor or "", "seen": self._seen.tolist()}

    def _load(self, op: str, state: Mapping[str, Any]) -> None:
        seen = tensor(op, "seen", state["seen"], self._seen)
        if not isinstance(state["anchor"], str):
            raise TypeError(f"{op}: anchor must be text (got {state['anchor']!r})")
        if not bool((seen >= 0).all()):
            raise ValueError(f"{op}: seen must not be negative (got {seen.tolist()})")
        anchor = self._checked_anchor(op, state["anchor"] or None)
        super()._load(op, state)
        self._anchor = anchor
        self._seen = seen

    def _in_sync(self) -> dict[str, int]:
        anchor = -1 if self._anchor is None else self.names.index(self._anchor)
        return {**super()._in_sync(), "number of the anchor": anchor}

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, anchor={self._anchor!r}, seed={self.seed})"
