"""MMPareto: the fused and the own loss's gradients of an encoder, combined without conflict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbal_fast import functional
from mmbal_fast.functional import _checks, _pareto
from mmbal_fast.training import Method, Record, Setting
from mmbal_fast.training.amp import as_optimizers, unscale_
from mmbal_fast.training.parameters import ParameterGroups, Parameters, Select, every
from mmbal_fast.training.shards import local_part

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
    """float64 ``[M]``: ``c``; the own loss's gradient has ``1 - c``. 0.5 without conflict, NaN
    where a gradient is not finite: the encoder keeps the plain sum."""


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
    the encoders' gradients in memory, and `functional.pareto_`: two launches, one that reads both
    sets and one that reads both and writes; no host read. On many ranks one all-reduce of ``g2``,
    packed; the other gradient is averaged by DistributedDataParallel, as always. FSDP2 averages
    both, in a backward pass for each: the own losses', then the fused one's; one all-reduce of 3 T
    float64 for the dot products.

    `backward` is not for compiled graphs: take ``torch.compile`` for the model. `step` compiles.

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
        self._groups = ParameterGroups(op, encoders, select or every)
        self._own: list[Tensor | None] | None = None  # gradients of the own losses, so far

    def backward(
        self, losses: Mapping[str, Tensor], *, grad_scaler: GradScaler | None = None
    ) -> None:
        """Instead of ``loss.backward()``; once per micro-batch under gradient accumulation.

        Args:
            losses: ``[]`` each: ``"fused"``, and for each modality that of its own head.
            grad_scaler: scales the losses, if it is enabled.

        Raises:
            ValueError: other names, a loss that is no scalar or has no graph.
            TypeError: no mapping.
            RuntimeError: FSDP2 is told not to average this micro-batch's gradients: it would mix
                both losses'.
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
        own = torch.stack([losses[name] for name in self.names]).sum()
        fused = losses["fused"]
        if grad_scaler is not None:
            own, fused = grad_scaler.scale(own), grad_scaler.scale(fused)
        if not self.enabled:
            (fused + own).backward()  # type: ignore[no-untyped-call]
            return
        if self._groups.shards is not None:
            added = self._backward_of_shards(op, fused, own)
        else:
            added = self._gradients_of(own)
            (fused + own).backward()  # type: ignore[no-untyped-call]
        self._own = added if self._own is None else _sums(self._own, added)

    def _gradients_of(self, own: Tensor) -> list[Tensor | None]:
        """Of each parameter; the graph stays, and ``.grad`` as it is."""
        parameters = self._groups.parameters
        trained = [each for each in parameters if each.requires_grad]
        if not trained:
            return [None] * len(parameters)
        found = iter(torch.autograd.grad(own, trained, retain_graph=True, allow_unused=True))
        added = [next(found) if each.requires_grad else None for each in parameters]
        # The gradient of a sum is expanded: elements that share memory.
        return [None if each is None else each.contiguous() for each in added]

    def _backward_of_shards(self, op: str, fused: Tensor, own: Tensor) -> list[Tensor | None]:
        """Two passes, because FSDP2 averages only what comes to ``.grad``; returns the own ones.

        Afterwards ``.grad`` holds the sum, as after one pass.
        """
        parameters = self._groups.parameters
        before = [each.grad for each in parameters]
        for each in parameters:
            each.grad = None
        own.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        added = [each.grad for each in parameters]
        for each, grad in zip(parameters, before, strict=True):
            each.grad = grad
        if all(each is None for each in added) and not self._groups.frozen():
            raise RuntimeError(
                f"{op}: FSDP2 must average the gradients of every micro-batch, as it does unless "
                "set_requires_gradient_sync(False) was called "
                "(got no gradient of the own losses on the parameters)"
            )
        fused.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for each, grad in zip(parameters, added, strict=True):
                if grad is not None:
                    each.grad = grad.clone() if each.grad is None else each.grad.add_(grad)
        return [None if each is None else local_part(each) for each in added]

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
            RuntimeError: no `backward` since the last step, or no encoder has a gradient; at the
                first step after FSDP2 has sharded parameters that the method knew whole.
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
        groups = self._groups
        sharded = groups.shards is not None
        groups.follow()
        if groups.shards is not None and not sharded:
            # Between forward and backward FSDP2 shows gathered parameters: their sharded ones are
            # known from before, or not at all.
            raise RuntimeError(
                f"{op}: {type(self).__name__} must be made after fully_shard, or this step be "
                "repeated from its forward pass (got parameters that have been sharded since)"
            )
        total = groups.gradients()
        if all(each is None for each in total):
            raise RuntimeError(
                f"{op}: must come between backward and zero_grad "
                f"(got no gradient on {len(total)} parameters)"
            )
        scale = None
        if scaler is not None:
            unscale_(scaler, optimizers)
            assert scaler._scale is not None
            scale = scaler._scale.to(groups.parameters[0].device)
        second = [
            torch.zeros_like(grad) if mine is None and grad is not None else mine
            for grad, mine in zip(total, own, strict=True)
        ]
        dots = None
        if groups.shards is not None:
            dots = functional.gradient_dots(total, second)
            groups.shards.sum_(dots)
        else:
            pairs = zip(total, second, strict=True)
            self._average([mine for grad, mine in pairs if grad is not None and mine is not None])
        gamma, count = self._scalar("gamma"), len(self.names)
        cosines, weights = _pareto.operation(
            total, second, groups.owners, count, gamma, dots, scale, names=groups.names
        ).unbind()
        self.last = MMParetoRecord(cosines, weights)
        return self.last

    def _average(self, grads: list[Tensor]) -> None:
        """Over the ranks, packed: one all-reduce for each type."""
        self._join()
        if self._group is None:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for each in grads:
            by_type.setdefault(each.dtype, []).append(each)
        for some in by_type.values():
            # Divided before it is summed, as in DistributedDataParallel: float16 has little room.
            packed = torch.cat([each.reshape(-1) for each in some])
            packed /= dist.get_world_size(self._group)
            dist.all_reduce(packed, group=self._group)
            parts = torch.split(packed, [each.numel() for each in some])
            torch._foreach_copy_(
                some, [part.view_as(each) for part, each in zip(parts, some, strict=True)]
            )

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


def _sums(one: list[Tensor | None], other: list[Tensor | None]) -> list[Tensor | None]:
    # Not in place: the gradients of two parameters may be one tensor.
    return [y if x is None else x if y is None else x + y for x, y in zip(one, other, strict=True)]
