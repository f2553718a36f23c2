"""OPM: on-the-fly prediction modulation, which drops features of the modality that dominates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

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
class OPMRecord(Record):
    """What a step measured and dropped, one entry for each modality."""

    ratios: Tensor = field(
        metadata={
            "title": "Discrepancy: above 1 dominates", "label": "ratio", "log": True, "line": 1.0,
        }
    )  # fmt: skip
    """float32 ``[M]``: discrepancy ratios of the scores that were observed last."""
    probabilities: Tensor = field(
        metadata={"title": "Probability of being dropped", "label": "q", "from": 0.0}
    )
    """float32 ``[M]``: of a sample's features; 0 where nothing was dropped in this step."""


class Dropped(NamedTuple):
    """The features to fuse, and what each sample counts.

    Attributes:
        features: ``[B, ...]`` for each modality, scaled, 0 where they were dropped.
        weight: ``[B]`` in the type of the features, 0 for a sample that lost every modality, else
            1. A mean over samples is ``(loss * weight).sum() / weight.sum().clamp(min=1)``.
    """

    features: dict[str, Tensor]
    weight: Tensor


def _probability(op: str, name: str, value: Any) -> float:
    number = _checks.number(op, name, value)
    if number > 1:
        raise ValueError(f"{op}: {name} must be from 0 to 1 (got {value})")
    return number


class OPM(FeatureMethod):
    """Drops samples' features of the modality that dominates, before the fusion.

    Wei, Hu, Du, Wen, "On-the-fly Modulation for Balanced Multimodal Learning" (TPAMI 2024),
    on-the-fly prediction modulation. With ratios ``rho_m`` of the modalities' own logits::

        q_m   = clamp(base (1 + strength tanh(rho_m - 1)), 0, 1)   where rho_m > 1, else 0
        x_m   <- x_m keep_m / (1 - theta),   keep_m[i] ~ Bernoulli(1 - q_m)
        theta = sum_m d_m q_m / sum_m d_m

    with ``d_m`` the number of features of modality m. A batch is left as it is with probability
    ``1 - apply``. The mask is drawn for whole samples.

    Where the released code differs: it removes samples that lost every modality from the batch;
    here they get ``Dropped.weight`` 0, so that shapes stay. Its draws come from NumPy's and the
    CPU's generators; here they are a function of seed, step, rank, modality and sample. It does
    not parse as released. For M modalities ``rho_m`` is the mean of ``S_m / S_j``,
    as in `functional.discrepancy_ratios`.

    Call `observe` with each modality's own logits, and the object with the features in front of the
    fusion: in a step with the logits of this step, if they do not need the fusion, else with those
    of the step before. In training only. Costs one kernel for the scores, M draws of ``[B]``, and
    the multiplication of the features, forward and backward; no host read. On many ranks one
    all-reduce of M float32 a step.

    Args:
        names: of the M >= 2 modalities.
        base: ``q_base``, 0 to 1; default 0.5, of the authors' command line.
        strength: ``lam``, from 0 on; default 0.5, of the authors' command line.
        apply: probability that a batch is modulated, 0 to 1; default 0.7, of the authors' command
            line.
        seed: 64-bit seed; default 0. Nothing is drawn from torch's generators.
        process_group: whose ranks share their scores; default all ranks.

    Raises:
        ValueError: fewer than two names, one given twice, or a setting out of range.
        TypeError: names that are no text, or settings that are no numbers.

    Example:
        >>> import torch
        >>> import mmbal_fast
        >>> opm = mmbal_fast.OPM(["audio", "image"], base=1.0, apply=1.0)
        >>> confident, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> opm.observe({"audio": confident, "image": unsure}, torch.tensor([0]))
        >>> features, weight = opm({"audio": torch.ones(1, 2), "image": torch.ones(1, 2)})
        >>> features  # the audio is dropped for sure, the image scaled by 2
        {'audio': tensor([[0., 0.]]), 'image': tensor([[2., 2.]])}
        >>> weight
        tensor([1.])
    """

    last: OPMRecord | None
    base = Setting(_probability)
    """``q_base``: the probability of a modality that barely dominates."""
    strength = Setting(_checks.number)
    """``lam``: how much it grows with the discrepancy."""
    apply = Setting(_probability)
    """Probability that a batch is modulated."""

    def __init__(
        self,
        names: Iterable[str],
        *,
        base: float = 0.5,
        strength: float = 0.5,
        apply: float = 0.7,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(names, seed=seed, process_group=process_group)
        self.base, self.strength, self.apply = base, strength, apply
        self._ratios = torch.ones(len(self.names), dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def observe(
        self, logits: Mapping[str, Tensor], target: Tensor, *, ignore_index: int = -100
    ) -> None:
        """Takes the scores of a batch for the calls that follow. A collective call on many ranks.

        Args:
            logits: for each modality its own logits ``[B, C]`` or ``[B, C, ...]``. Detached.
            target: as for `functional.contribution_scores`.
            ignore_index: label of samples that count for nothing; default -100.

        Raises:
            ValueError: other names, or as `functional.contribution_scores` does.
            TypeError: as `functional.contribution_scores` does.
            IndexError: as `functional.contribution_scores` does.
        """
        op = f"{type(self).__name__}.observe"
        _checks.mapping(op, "logits", logits, "tensors")
        if logits.keys() != set(self.names):
            raise ValueError(
                f"{op}: logits must be given for {list(self.names)} (got {list(logits)})"
            )
        ordered = [logits[name] for name in self.names]
        scores = functional.contribution_scores(ordered, target, ignore_index=ignore_index)
        self._join()
        if self._group is not None:
            dist.all_reduce(scores, group=self._group)
        # Undefined where nobody scores: then nobody dominates.
        self._ratios = functional.discrepancy_ratios(scores).nan_to_num(nan=1.0)

    def __call__(self, features: Mapping[str, Tensor]) -> Dropped:  # type: ignore[override]
        """The features to fuse in this step. Call it in training only, once for each step.

        Args:
            features: ``[B, ...]`` of each modality.

        Raises:
            ValueError: other names, or batches of different size or device.
            TypeError: features that are no floating point tensors.
        """
        ordered = self._features(type(self).__name__, features)
        self._join()
        first = ordered[0]
        count, device = first.shape[0], first.device
        self._ratios = ratios = self._ratios.to(device)
        q = torch.zeros_like(ratios)
        kept = torch.ones(len(ordered), count, dtype=torch.bool, device=device)
        if self.enabled:
            excess = self.base * (1.0 + self.strength * torch.tanh(ratios - 1.0))
            q = torch.where(ratios > 1.0, excess, 0.0).clamp(0.0, 1.0)
            # One draw for the batch, the same on all ranks, and one for each sample and modality.
            q = q * (self._uniform(1, device, 0) < self.apply)
            rank = 0 if self._group is None else dist.get_rank(self._group)
            for m in range(len(ordered)):
                stream = 1 + m + rank * len(ordered)
                kept[m] = self._uniform(count, device, stream) >= q[m]
            self._advance()
        widths = torch.tensor(
            [each[0].numel() if count else 1 for each in ordered],
            dtype=torch.float32,
            device=device,
        )
        theta = (widths * q).sum() / widths.sum()
        factor = kept / (1.0 - theta)
        self.last = OPMRecord(ratios, q)
        dropped = {
            name: each * factor[m].to(each.dtype).reshape(count, *(1,) * (each.ndim - 1))
            for m, (name, each) in enumerate(zip(self.names, ordered, strict=True))
        }
        return Dropped(dropped, kept.any(dim=0).to(first.dtype))

    def _uniform(self, count: int, device: torch.device, stream: int) -> Tensor:
        """float32 ``[count]`` in [0, 1], a function of seed, step and stream alone."""
        like = torch.empty(count, dtype=torch.float32, device=device)
        normal = functional.noise_like(like, seed=self.seed, step=self._counter, tensor_id=stream)
        uniform: Tensor = torch.special.ndtr(normal)
        return uniform

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"ratios": self._ratios.clone()}

    def _load(self, op: str, state: Mapping[str, Any]) -> None:
        ratios = tensor(op, "ratios", state["ratios"], self._ratios)
        if bool((ratios < 0).any()):
            raise ValueError(f"{op}: ratios must not be negative (got {ratios.tolist()})")
        super()._load(op, state)
        self._ratios = ratios
