"""MMPareto: the fused and the own loss's gradients of an encoder, combined without conflict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbal_fast import functional
from mmbal_fast.functional import _checks
from mmbal_fast.training import Method, Record, Setting
from mmbal_fast.training.amp import as_optimizers, unscale_
from mmbal_fast.training.parameters import ParameterGroups, Parameters, Select

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


@dataclass(frozen=True)
class MMParetoRecord(Record):
    """How the two gradients of each encoder met, one entry for each modality."""

    cosines: Tensor = field(
        metadata={"title": "Agreement", "label": "cosine of the two gradients", "line": 0.0}
    )
    """float64 ``[M]``: between the fused and the own loss's gradient; 0 where one is zero."""
    weights: Tensor = field(
        metadata={"title": "Weight of the fused loss's gradient", "label": "c", "line": 0.5}
    )
    """float64 ``[M]``: ``c``; the own loss's gradient has ``1 - c``. 0.5 without conflict."""


class MMPareto(Method):
    """Combines two gradients of each encoder: of the fused loss, and of its modality's own loss.

    Wei, Hu, "MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance" (ICML 2024),
    algorithm 1. For encoder m with gradients ``g1`` (fused) and ``g2`` (own), over all its
    parameters::

        c = 1/2                                        where cos(g1, g2) > 0
        c = (g2.g2 - g1.g2) / |g1 - g2|^2              else: the shortest convex combination
        h = 2 (c g1 + (1 - c) g2)
        g <- gamma h max(1, |g1 + g2| / |h|)           the last factor for each tensor

    `backward` takes the place of ``loss.backward()``: it sums all losses, so that heads get their
    plain gradients, and keeps ``g2`` of the encoders beside. `step` goes before the optimizer's.

    Where the released code differs: it takes four backward passes, clones every gradient and
    computes on concatenations; here one pass over the two gradients gives a table of dot products,
    and everything else follows from it on the device. Its ``c`` of a zero own gradient, 0.001, is
    kept: after rescaling ``g`` is ``gamma g1``. ``0 / 0`` of a zero tensor, NaN there, is 0 here.
    Where there is no conflict ``g`` is ``gamma (g1 + g2)``, as released: gamma acts everywhere.

    Costs a second backward pass through the encoders (and none through the fusion), one more set of
    the encoders' gradients in memory, one pass that reads both, one that reads both and writes; no
    host read. On many ranks one all-reduce of ``g2``, packed; the other gradient is averaged by
    DistributedDataParallel, as always.

    Args:
        encoders: for each of the M >= 2 modalities its encoder: a module, parameters, or named
            parameters. The fusion and the heads belong to none.
        gamma: factor of the result, from 0 on; default 1.5, of the authors' code.
        select: ``(name, parameter) -> bool``; default all parameters, as in the authors' code.
        process_group: over whose ranks gradients are averaged; default all ranks if
            torch.distributed is initialised.

    Raises:
        ValueError: fewer than two modalities, one without parameters, a parameter in two, ``gamma``
            negative or NaN.
        TypeError: a modality that is no module and holds no parameters.

    Example:
        >>> import torch
        >>> import mmbal_fast
        >>> theta = {name: torch.nn.Parameter(torch.zeros(2)) for name in ("audio", "image")}
        >>> pareto = mmbal_fast.MMPareto({name: [each] for name, each in theta.items()})
        >>> audio, image = theta.values()
        >>> own = {"audio": audio[1] - audio[0], "image": image.sum()}
        >>> pareto.backward({"fused": audio[0] + image.sum(), **own})
        >>> record = pareto.step()
        >>> audio.grad  # (1, 0) and (-1, 1) conflict: c = 0.6
        tensor([0.6708, 1.3416])
        >>> image.grad  # (1, 1) twice: 3 (1, 1)
        tensor([3., 3.])
    """

    last: MMParetoRecord | None
    gamma = Setting(_checks.number)
    """Factor of the result."""

    _what = "modalities"

    def __init__(
        self,
        encoders: Mapping[str, Parameters] | nn.ModuleDict,
        *,
        gamma: float = 1.5,
        select: Select | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        op = type(self).__name__
        _checks.mapping(op, "encoders", encoders, "encoders")
        super().__init__(encoders.keys(), process_group=process_group)
        self.gamma = gamma
        self._groups = ParameterGroups(op, encoders, select or _everything)
        self._own: list[Tensor | None] | None = None  # gradients of the own losses, so far
        # Which modality each gradient belongs to, on the host and on the device.
        self._owner: tuple[list[int], Tensor] = ([], torch.empty(0, device="cpu"))

    def backward(
        self, losses: Mapping[str, Tensor], *, grad_scaler: GradScaler | None = None
    ) -> None:
        """Instead of ``loss.backward()``; once per micro-batch under gradient accumulation.

        Args:
            losses: ``[]`` each: ``"fused"``, and for each modality that of its own head.
            grad_scaler: scales the losses, if it is enabled.

        Raises:
            ValueError: other names, a loss that is no scalar or has no graph.
            TypeError: no mapping; parameters that are sharded, which do not see two gradients.
        """
        op = f"{type(self).__name__}.backward"
        _checks.mapping(op, "losses", losses, "tensors")
        wanted = {"fused", *self.names}
        if losses.keys() != wanted:
            raise ValueError(f"{op}: losses must be {sorted(wanted)} (got {sorted(losses)})")
        for name, each in losses.items():
            if each.ndim or not each.requires_grad:
                raise ValueError(
                    f"{op}: losses must be scalars with a graph (got shape {list(each.shape)}, "
                    f"requires_grad={each.requires_grad} for '{name}')"
                )
        self._groups.follow()
        if self._groups.shards is not None:
            raise TypeError(
                f"{op}: parameters must not be sharded, use DistributedDataParallel "
                "(got DTensors, whose second gradient FSDP2 does not keep)"
            )
        own = torch.stack([losses[name] for name in self.names]).sum()
        fused = losses["fused"]
        if grad_scaler is not None:
            own, fused = grad_scaler.scale(own), grad_scaler.scale(fused)
        if self.enabled:
            trained = [each for each in self._groups.parameters if each.requires_grad]
            found = iter(
                torch.autograd.grad(own, trained, retain_graph=True, allow_unused=True)
                if trained
                else ()
            )
            added = [
                next(found) if each.requires_grad else None for each in self._groups.parameters
            ]
            self._own = added if self._own is None else _sums(self._own, added)
        (fused + own).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(
        self,
        *,
        grad_scaler: GradScaler | None = None,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
    ) -> MMParetoRecord:
        """Writes the combined gradients. Call it after `backward` and before the optimizer.

        Args:
            grad_scaler: as `backward` had it; its optimizers' gradients are unscaled, unless
                ``grad_scaler.unscale_`` was called before.
            optimizer: the optimizer, or all of them, that ``grad_scaler`` steps.

        Returns:
            Cosines and weights, on the device; 1/2 and NaN while `enabled` is False.

        Raises:
            RuntimeError: no `backward` since the last step, or no encoder has a gradient.
            ValueError: ``grad_scaler`` without ``optimizer``.
        """
        op = f"{type(self).__name__}.step"
        scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        optimizers = as_optimizers(op, scaler, optimizer) if scaler is not None else []
        if not self.enabled:
            if scaler is not None:
                unscale_(scaler, optimizers)
            self._own = None
            device = self._groups.parameters[0].device
            half = torch.full((len(self.names),), 0.5, dtype=torch.float64, device=device)
            self.last = MMParetoRecord(torch.full_like(half, torch.nan), half)
            return self.last
        own, self._own = self._own, None
        if own is None:
            raise RuntimeError(f"{op}: needs backward() first (got none since the last step)")
        given = self._groups.gradients()
        total = {index: grad for index, grad in enumerate(given) if grad is not None}
        if not total:
            raise RuntimeError(
                f"{op}: must come between backward and zero_grad "
                f"(got no gradient on {len(given)} parameters)"
            )
        if scaler is not None:
            unscale_(scaler, optimizers)
        first = list(total.values())
        second = [
            # The gradient of a sum is expanded: elements that share memory.
            torch.zeros_like(grad) if (mine := own[index]) is None else mine.contiguous()
            for index, grad in total.items()
        ]
        if scaler is not None:
            assert scaler._scale is not None
            torch._foreach_mul_(second, scaler._scale.double().reciprocal().float())
        self._average(second)
        modality = [self._groups.modality[index] for index in total]
        self.last = self._combine(first, second, modality)
        return self.last

    def _average(self, grads: list[Tensor]) -> None:
        """Over the ranks, in one all-reduce for each type."""
        self._join()
        if self._group is None:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for each in grads:
            by_type.setdefault(each.dtype, []).append(each)
        for some in by_type.values():
            packed = torch.cat([each.reshape(-1) for each in some])
            dist.all_reduce(packed, group=self._group)
            packed /= dist.get_world_size(self._group)
            parts = torch.split(packed, [each.numel() for each in some])
            torch._foreach_copy_(
                some, [part.view_as(each) for part, each in zip(parts, some, strict=True)]
            )

    def _combine(
        self, total: list[Tensor], own: list[Tensor], modality: list[int]
    ) -> MMParetoRecord:
        """Writes to ``total``, from the dot products of it and of ``own``."""
        table = functional.gradient_dots(total, own)  # (G.G, G.g2, g2.g2) of each tensor
        whole, mixed, c_ = table.unbind(1)
        b_ = mixed - c_  # g1.g2, as g1 = G - g2
        a_ = (whole - mixed - b_).clamp(min=0.0)
        if self._owner[0] != modality or self._owner[1].device != table.device:
            # Kept, so that a step copies nothing to the device.
            owner = torch.tensor(modality, dtype=torch.int64, device="cpu").to(table.device)
            self._owner = modality, owner
        owner = self._owner[1]
        count = len(self.names)
        a, b, c = (
            torch.zeros(count, dtype=torch.float64, device=table.device).index_add(0, owner, each)
            for each in (a_, b_, c_)
        )
        lengths = (a * c).sqrt()
        cosines = torch.where(lengths > 0, b / lengths, 0.0)
        weight = (c - b) / (a - 2 * b + c)
        weight = torch.where(b >= c, 0.001, weight)  # in this order, as the solver has it
        weight = torch.where(b >= a, 0.999, weight)
        weight = torch.where(cosines > 0, 0.5, weight)
        k1, k2 = 2 * weight[owner], 2 * (1 - weight[owner])
        length = k1 * k1 * a_ + 2 * k1 * k2 * b_ + k2 * k2 * c_
        ratio = torch.where(length > 0, (whole / length).sqrt(), 1.0)
        factor = self.gamma * ratio.clamp(min=1.0)
        # h = k1 g1 + k2 g2 = k1 G + (k2 - k1) g2
        scales, shares = (factor * k1).float(), (factor * (k2 - k1)).float()
        torch._foreach_mul_(total, list(scales.unbind()))
        torch._foreach_addcmul_(total, own, list(shares.unbind()))
        return MMParetoRecord(cosines, weight)

    def _before_optimizer(self, scaler: GradScaler | None, optimizer: Optimizer) -> Record | None:
        if self._own is None and self.last is not None:
            return None
        return self.step(grad_scaler=scaler, optimizer=optimizer)

    def _before_training(self) -> None:
        self._groups.look()

    def _forget(self) -> None:
        self._own = None

    def __getstate__(self) -> dict[str, Any]:
        """Without gradients of a step that is not finished."""
        return super().__getstate__() | {"_own": None}


def _everything(name: str, parameter: nn.Parameter) -> bool:
    return True


def _sums(one: list[Tensor | None], other: list[Tensor | None]) -> list[Tensor | None]:
    return [
        y if x is None else x if y is None else x.add_(y) for x, y in zip(one, other, strict=True)
    ]
