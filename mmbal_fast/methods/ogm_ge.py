"""OGM-GE: on-the-fly gradient modulation with generalization enhancement."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmbal_fast.functional import _checks, modulation_coefficients
from mmbal_fast.reference import Rule
from mmbal_fast.training import GradientModulation, Setting
from mmbal_fast.training.modulation import Kernel
from mmbal_fast.training.parameters import Parameters, Select

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _rule(op: str, name: str, value: object) -> Any:
    return value if callable(value) else _checks.rule_name(op, value)


class OGMGE(GradientModulation):
    """Balances the modalities of a network, between ``loss.backward()`` and ``optimizer.step()``.

    Each step compares the softmax contributions of the modalities, and scales down the gradients of
    those that contribute more than the others: ``g <- k_m g + N(0, std(g))``. Peng et al.,
    "Balanced Multimodal Learning via On-the-fly Gradient Modulation" (CVPR 2022), sections 3.2 and
    3.3. At most three kernels and no host synchronisation per step; one read and one write of the
    gradients on the CPU.

    Args:
        modalities: for each of the M >= 2 modalities its encoder: a module, parameters, or named
            parameters. The fusion and the head belong to none. Modules are followed: parameters
            and submodules may be replaced, added and taken away.
        alpha: strength of the modulation, >= 0. The authors' code has 0.8 for CREMA-D and 0.1 for
            VGGSound.
        noise: factor of the added noise, default 1 as published; 0 is OGM, without noise.
        rule: from ratios to coefficients, see `functional.modulation_coefficients`; default the
            published one. A callable gets the ratios, float32 ``[M]``, and the scores too if it
            takes two arguments, and returns coefficients.
        select: ``(name, parameter) -> bool``, which parameters are modulated; default those of two
            or more dimensions, so no biases and norms, without the tables of ``nn.Embedding`` and
            ``nn.EmbeddingBag``, where noise would move rows that no sample used. The authors' code
            takes those of four dimensions: ``select=lambda name, p: p.ndim == 4``. Parameters
            without names get their position as name.
        seed: 64-bit seed of the noise. Nothing is drawn from torch's generators.
        process_group: whose ranks share their scores, so that all compute the same coefficients;
            default all ranks if torch.distributed is initialised, as in DistributedDataParallel.
            With tensor parallelism give the data-parallel group, or each sample counts once per
            rank that sees it, in the scores but not in the ratios. Made before torch.distributed
            is initialised, the object joins at its first step.

    What works with what, and the order of calls: ``docs/training_stacks.md``.

    Raises:
        ValueError: fewer than two modalities, a modality without selected parameters, a parameter
            in two modalities, negative or NaN ``alpha`` or ``noise``, an unknown rule.
        TypeError: a modality that is no module and holds no parameters, or whose parameters are
            flattened by FSDP1 or partitioned by DeepSpeed's ZeRO.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import mmbal_fast
        >>> _ = torch.manual_seed(0)
        >>> encoders = nn.ModuleDict({"audio": nn.Linear(4, 8), "image": nn.Linear(6, 8)})
        >>> head = nn.Linear(16, 3)
        >>> balancer = mmbal_fast.OGMGE(encoders, alpha=0.8)
        >>> batch = {"audio": torch.randn(5, 4), "image": torch.randn(5, 6)}
        >>> target = torch.tensor([0, 1, 2, 0, 1])
        >>> features = {name: encoders[name](x) for name, x in batch.items()}
        >>> loss = nn.functional.cross_entropy(head(torch.cat(list(features.values()), 1)), target)
        >>> loss.backward()
        >>> record = balancer.step(mmbal_fast.nn.unimodal_logits(features, head), target)
        >>> bool((record.coefficients < 1).sum() == 1)  # one of the two dominates
        True
    """

    alpha = Setting(_checks.number)
    """Strength of the modulation."""
    rule = Setting(_rule)
    _rule: Rule
    """From ratios to coefficients: a published rule's name, or a callable."""

    def __init__(
        self,
        modalities: Mapping[str, Parameters] | nn.ModuleDict,
        *,
        alpha: float,
        noise: float = 1.0,
        rule: Rule = "cvpr2022",
        select: Select | None = None,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.alpha = alpha
        self.rule = rule
        super().__init__(
            modalities, noise=noise, select=select, seed=seed, process_group=process_group
        )

    @property
    def _named_rule(self) -> str:
        """Of the kernels, which leave the coefficients to a callable."""
        rule = self._rule
        return rule if isinstance(rule, str) else "none"

    def _kernel(self) -> Kernel:
        return Kernel(alpha=self._scalar("alpha"), rule=self._named_rule)

    def _derive(self, *, summed: bool) -> None:
        super()._derive(summed=summed)
        if callable(rule := self._rule):
            self._rows[2] = modulation_coefficients(
                self._rows[1], 0.0, rule=lambda ratios: _called(rule, ratios, self._rows[0])
            )


def _called(rule: Callable[..., Tensor], ratios: Tensor, scores: Tensor) -> Tensor:
    """Three-modality rules, such as ``S_m / min S``, need the scores."""
    if len(inspect.signature(rule).parameters) > 1:
        return rule(ratios, scores)
    return rule(ratios)
