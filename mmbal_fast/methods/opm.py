"""OPM: on-the-fly prediction modulation, which drops features of the modality that dominates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmbal_fast.functional import _checks
from mmbal_fast.functional._derive import derive_
from mmbal_fast.functional._drop_features import drop, probability
from mmbal_fast.functional._logits import classes_second
from mmbal_fast.functional._observe import observe_
from mmbal_fast.functional._operation import in_graph
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


def _probability(op: str, name: str, value: float) -> float:
    return float(probability(op, name, _checks.number(op, name, value)))


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
    of the step before. In training only. Costs one kernel for the scores, one for the features,
    which reads and writes them once, and one for their gradients; no host read. On many ranks one
    all-reduce of M float32 and a kernel more a step.

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
        # Scores, ratios and what is not used here, as of a modulation.
        self._rows = torch.ones(3, len(self.names), dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def observe(
        self,
        logits: Mapping[str, Tensor],
        target: Tensor,
        *,
        ignore_index: int = -100,
        class_dim: int = 1,
        multi_label: bool = False,
    ) -> None:
        """Takes the scores of a batch for the calls that follow. A collective call on many ranks.

        Args:
            logits: for each modality its own logits ``[B, C]`` or ``[B, C, ...]``. Detached.
            target: as for `functional.contribution_scores`.
            ignore_index: label of samples that count for nothing; default -100.
            class_dim: as for `functional.contribution_scores`.
            multi_label: as for `functional.contribution_scores`.

        Raises:
            ValueError: other names, or as `functional.contribution_scores` does.
            TypeError: as `functional.contribution_scores` does.
            IndexError: as `functional.contribution_scores` does.
        """
        op = f"{type(self).__name__}.observe"
        ordered = _checks.by_name(op, "logits", logits, self.names)
        ordered, target = classes_second(op, ordered, target, class_dim)
        if not isinstance(target, Tensor) or target.device != self._rows.device or in_graph():
            _checks.batch(op, ordered, target, multi_label=multi_label)
            self._place(target.device)
        observe_(
            self._rows, None, None, None, ordered, target, multi_label, ignore_index, False,
            "probability", 0.0, 1.0, "none", None,
            op=op,
        )  # fmt: skip
        self._join()
        if self._group is not None:
            dist.all_reduce(self._rows[0], group=self._group)
            derive_(self._rows, None, None, None, True, 0.0, 1.0, "none")

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
        self._place(first.device)
        ratios = self._rows[1]
        if not self.enabled:
            self.last = OPMRecord(ratios, torch.zeros_like(ratios))
            weight = first.new_ones(first.shape[0])
            return Dropped(dict(zip(self.names, ordered, strict=True)), weight)
        rank = 0 if self._group is None else dist.get_rank(self._group)
        compiled = in_graph()
        results, weight, q, _ = drop(
            ordered,
            ratios,
            self._scalar("base"),
            self._scalar("strength"),
            self._scalar("apply"),
            self.seed,
            self._counter,
            1 + rank * len(ordered),
            advance=not compiled,
        )
        if compiled:
            self._advance()
        self.last = OPMRecord(ratios, q)
        return Dropped(dict(zip(self.names, results, strict=True)), weight)

    def _place(self, device: torch.device) -> None:
        """Has the scores where the logits and features are."""
        if self._rows.device != device:
            with torch.inference_mode(False):
                self._rows = self._rows.to(device)

    def _state(self) -> dict[str, Any]:
        # Undefined where nobody scores: then nobody dominates.
        return super()._state() | {"ratios": self._rows[1].nan_to_num(nan=1.0)}

    def _load(self, op: str, state: Mapping[str, Any]) -> None:
        ratios = tensor(op, "ratios", state["ratios"], self._rows[1])
        if bool((ratios < 0).any()):
            raise ValueError(f"{op}: ratios must not be negative (got {ratios.tolist()})")
        super()._load(op, state)
        self._rows[1] = ratios
