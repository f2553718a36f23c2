"""OGM-GE: on-the-fly gradient modulation with generalization enhancement.

Peng, Wei, Deng, Wang, Hu, "Balanced Multimodal Learning via On-the-fly Gradient Modulation"
(CVPR 2022).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmbal_fast.functional import _checks, modulation_coefficients
from mmbal_fast.functional._derive import derive_
from mmbal_fast.functional._gradient_moments import moments_of
from mmbal_fast.functional._modulate import (
    LABEL_OUT_OF_RANGE,
    NON_FINITE_GRADIENT,
    finite_moments,
    unscales,
    update_,
)
from mmbal_fast.functional._observe import observe_
from mmbal_fast.functional._operation import in_graph
from mmbal_fast.methods import _distributed
from mmbal_fast.methods._grad_scaler import (
    FusedUnscaling,
    as_optimizers,
    found_inf,
    unscale_,
)
from mmbal_fast.reference import Rule

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

Parameters: TypeAlias = nn.Module | Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]]
"""What belongs to a modality: a module, parameters, or named parameters."""

Select: TypeAlias = Callable[[str, nn.Parameter], bool]
"""Whether a parameter's gradient is modulated, from its name and itself."""


@dataclass(frozen=True)
class ModulationRecord:
    """What one step measured and applied, one entry per modality in the order of their names.

    The tensors are views of buffers that the next step overwrites; `clone` keeps them.
    """

    scores: Tensor
    """float32 ``[M]``: summed softmax probability of the true class, over all ranks."""
    ratios: Tensor
    """float32 ``[M]``: discrepancy ratios; above 1 for a modality that dominates."""
    coefficients: Tensor
    """float32 ``[M]``: what the gradients were scaled by."""
    skipped: Tensor
    """bool ``[]``: the gradients were not finite, so the `GradScaler` that was given to the step
    skips the optimizer's. False without one."""

    def clone(self) -> ModulationRecord:
        """A copy that later steps do not change."""
        return ModulationRecord(
            self.scores.clone(),
            self.ratios.clone(),
            self.coefficients.clone(),
            self.skipped.clone(),
        )


def _select_weights(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2


class OGMGE:
    """Balances the modalities of a network, between ``loss.backward()`` and ``optimizer.step()``.

    Each step compares the softmax contributions of the modalities, and scales down the gradients of
    those that contribute more than the others: ``g <- k_m g + N(0, std(g))``. Peng et al.,
    "Balanced Multimodal Learning via On-the-fly Gradient Modulation" (CVPR 2022), sections 3.2 and
    3.3. At most three kernels and no host synchronisation per step.

    Args:
        modalities: for each of the M >= 2 modalities its encoder: a module, parameters, or named
            parameters. The fusion and the head belong to none.
        alpha: strength of the modulation, >= 0. The authors' code has 0.8 for CREMA-D and 0.1 for
            VGGSound.
        noise: factor of the added noise, default 1 as published; 0 is OGM, without noise.
        rule: from ratios to coefficients, see `functional.modulation_coefficients`; default the
            published one. A callable gets the ratios, float32 ``[M]``, and returns coefficients.
        select: ``(name, parameter) -> bool``, which parameters are modulated; default those of two
            or more dimensions, so no biases and norms. The authors' code takes those of four.
            Parameters without names get their position as name.
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
        op = type(self).__name__
        _checks.mapping(op, "modalities", modalities, "encoders")
        self.alpha = _checks.number(op, "alpha", alpha)
        self.noise = _checks.number(op, "noise", noise)
        self.rule: Rule = rule
        self._rule_name = "none" if callable(rule) else _checks.rule_name(op, rule)
        self.seed = _checks.word64(op, "seed", seed)
        self.enabled = True
        """Whether `step` modulates. Set it to False to train plainly from some epoch on: the
        authors' code modulates in epochs 0 to 50."""
        self.last: ModulationRecord | None = None
        """What the last step measured and applied."""
        if len(modalities) < 2:
            raise ValueError(f"{op}: modalities must be at least two (got {list(modalities)})")
        self.modality_names = tuple(modalities)
        """The order of the entries of a `ModulationRecord`."""
        self._modalities: dict[str, nn.Module | list[Any]] = {}
        for name, value in modalities.items():
            if isinstance(value, DistributedDataParallel | nn.DataParallel):
                value = value.module
            if not isinstance(value, nn.Module):
                value = [value] if isinstance(value, Tensor) else list(value)  # type: ignore[assignment]
            self._modalities[name] = value  # type: ignore[assignment]
        self._select = select or _select_weights
        self.refresh()
        self._pending = False  # scores observed since the last step
        home = self._parameters[0].device
        self._counter = torch.zeros(1, dtype=torch.int64)  # steps done
        self._status = torch.zeros(1, dtype=torch.int32)
        self._allocate(torch.device("cpu") if home.type == "meta" else home)
        self.process_group = process_group
        """The group given, or None for all ranks."""
        self._group: ProcessGroup | None = None  # with other ranks in it
        self._join()

    def refresh(self) -> None:
        """Looks for the modalities' parameters again.

        Call it after parameters were added to a module, removed, or replaced by others. A step that
        finds no gradient at all does so by itself, so that ``fully_shard`` may come after the
        constructor.

        Raises:
            ValueError: as the constructor does.
            TypeError: as the constructor does.
        """
        op = type(self).__name__
        parameters, modality, names = _collect(op, self._modalities, self._select)
        ids = _ids(names)
        shards = _distributed.ShardLayout.of(op, parameters, names)
        self._parameters, self._names, self._shards = parameters, names, shards
        pieces = range(len(names)) if shards is None else shards.parameters
        self._modality = [modality[index] for index in pieces]
        self._tensor_ids = [ids[index] for index in pieces]
        self._piece_names = [names[index] for index in pieces]

    def observe(
        self, logits: Mapping[str, Tensor], target: Tensor, *, ignore_index: int = -100
    ) -> None:
        """Adds a (micro-)batch to the scores of the next `step`.

        Under gradient accumulation call it once per micro-batch, and `step` once per optimizer
        step.

        Args:
            logits: for each modality its own logits ``[B, C]`` or ``[B, C, ...]``; see
                `nn.unimodal_logits` and `nn.masked_logits`. Detached.
            target: class indexes or soft labels, see `functional.contribution_scores`.
            ignore_index: label of samples that count for nothing; default -100.

        Raises:
            ValueError: missing or unknown modalities, shapes or devices that do not fit together.
            IndexError: a label out of range, on the CPU; on CUDA it is kept for `check`.
        """
        _checks.mapping("OGMGE.observe", "logits", logits, "tensors")
        if logits.keys() != set(self.modality_names):
            raise ValueError(
                f"OGMGE.observe: logits must be given for {list(self.modality_names)} "
                f"(got {list(logits)})"
            )
        ordered = [logits[name] for name in self.modality_names]
        _checks.batch("OGMGE.observe", ordered, target)
        state = self._state_on(target.device)
        observe_(
            state,
            ordered,
            target,
            ignore_index,
            self._pending,
            self.alpha,
            self._rule_name,
            self._status,
        )
        self._pending = True

    def step(
        self,
        logits: Mapping[str, Tensor] | None = None,
        target: Tensor | None = None,
        *,
        ignore_index: int = -100,
        grad_scaler: GradScaler | None = None,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        error_if_nonfinite: bool = False,
    ) -> ModulationRecord:
        """Modulates the gradients in place. Call it after ``backward`` and before the optimizer.

        All ranks of a process group must call it equally often: one all-reduce of M float32, and
        with FSDP2 one of 3 T float64.

        Args:
            logits: as for `observe`, or None if `observe` was called for every micro-batch.
            target: as for `observe`.
            ignore_index: as for `observe`.
            grad_scaler: scaler whose ``scale`` the loss went through. Its optimizers' gradients are
                unscaled, unless ``grad_scaler.unscale_`` was called before, in the same pass over
                memory where there is one optimizer. A step that the scaler is going to skip does
                not count. Then call ``grad_scaler.step(optimizer)`` as always.
            optimizer: the optimizer, or all of them, that ``grad_scaler`` steps.
            error_if_nonfinite: read the gradients' moments back to the host and raise before
                anything is written, and raise for what `check` finds.

        Returns:
            Scores, ratios and coefficients, on the device. While `enabled` is False the gradients
            stay as they are and the coefficients are 1.

        Raises:
            RuntimeError: nothing was observed since the last step; a gradient whose elements share
                memory; with ``error_if_nonfinite``, a gradient that holds NaN or inf.
            ValueError: as for `observe`; only one of ``logits`` and ``target``; logits on the CPU
                with gradients elsewhere; ``grad_scaler`` without ``optimizer`` or with
                ``error_if_nonfinite``.
            TypeError: a gradient that is sparse, complex or integer.
        """
        op = "OGMGE.step"
        if (logits is None) != (target is None):
            raise ValueError(f"{op}: logits and target must be given together (got one)")
        scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        optimizers = as_optimizers(op, optimizer) if scaler is not None else []
        if scaler is not None and error_if_nonfinite:
            raise ValueError(
                f"{op}: error_if_nonfinite must not be set with a grad_scaler, which skips such "
                "steps (got both)"
            )
        if logits is not None and target is not None:
            self.observe(logits, target, ignore_index=ignore_index)
        if not self._pending:
            raise RuntimeError(
                f"{op}: needs scores, from observe() or from logits and target "
                "(got none since the last step)"
            )
        self._pending = False  # a step that fails must not add its scores to the next one's
        if error_if_nonfinite:
            self.check()
        work = self._sum_scores()
        if self.enabled:
            self._modulate(work, scaler, optimizers, error_if_nonfinite)
        else:
            self._derive(work)
            if scaler is not None:
                unscale_(scaler, optimizers)
        if scaler is not None:
            self._skipped.copy_(found_inf(scaler, optimizers, self._skipped.device))
            if self.enabled:
                self._counter.add_(~self._skipped)
        self.last = self._record if scaler is None else self._scaled_record
        return self.last

    def _modulate(
        self,
        work: dist.Work | None,
        scaler: GradScaler | None,
        optimizers: Sequence[Optimizer],
        error_if_nonfinite: bool,
    ) -> None:
        grads = self._gradients()
        if all(grad is None for grad in grads):
            self.refresh()
            grads = self._gradients()
        shards, fused, moments = self._shards, None, None
        if scaler is not None:
            if shards is None and unscales(self._state.device):
                fused = FusedUnscaling.of(scaler, optimizers, self._parameters, grads)
            if fused is None:
                unscale_(scaler, optimizers)
        if error_if_nonfinite or (shards is not None and self.noise != 0):
            # Where no gradient says which device it is, the ranks still sum their zeros.
            moments = moments_of(grads, names=self._names).to(self._state.device)
            if shards is not None:
                shards.complete_(moments)
            if error_if_nonfinite:
                finite_moments("OGMGE.step", grads, moments, self._names)
        self._derive(work)
        update_(
            grads if shards is None else shards.split(grads),
            coefficients=self._record.coefficients,
            modality=self._modality,
            noise=self.noise,
            seed=self.seed,
            step=self._counter,
            tensor_ids=self._tensor_ids,
            offsets=None if shards is None else shards.offsets,
            moments=moments if shards is None else shards.per_piece(moments),
            status=self._status,
            advance=scaler is None,
            names=self._piece_names,
            inverse_scale=None if fused is None else fused.inverse_scale,
            found_inf=None if fused is None else fused.found_inf,
        )
        if fused is not None:
            fused.finish()

    def _gradients(self) -> list[Tensor | None]:
        # A frozen parameter may hold an old gradient, and zero ones would get noise of size eps.
        if self._shards is None:
            return [each.grad if each.requires_grad else None for each in self._parameters]
        return self._shards.local_gradients(self._parameters)

    def _join(self) -> None:
        """Finds the other ranks, if there are any by now."""
        if self._group is None:
            self._group = _distributed.resolve_group(self.process_group)
            if self._group is not None:
                self.seed = _distributed.broadcast_seed(self.seed, self._group)

    def _sum_scores(self) -> dist.Work | None:
        """Starts to sum the scores over the ranks."""
        self._join()
        if self._group is None:
            return None
        work: dist.Work | None = dist.all_reduce(
            self._state[0], group=self._group, async_op=not in_graph()
        )
        return work

    def _derive(self, work: dist.Work | None) -> None:
        """Ratios and coefficients from the scores, once they are summed."""
        state = self._state
        if work is not None:
            work.wait()  # on CUDA the stream waits, not the host
        if self._group is None:
            pass  # done where they were observed
        else:
            derive_(state, True, self.alpha, self._rule_name)
        if not self.enabled:
            state[2] = 1.0
        elif callable(self.rule):
            state[2] = modulation_coefficients(state[1], 0.0, rule=self.rule)

    def check(self) -> None:
        """Raises for what the kernels found on the device since the last check. Reads the host.

        Raises:
            IndexError: a label was outside ``[0, C)`` and not ``ignore_index``.
            RuntimeError: a gradient held NaN or inf. It was scaled, without noise.
        """
        status = int(self._status.item())
        self._status.zero_()
        if status & LABEL_OUT_OF_RANGE:
            raise IndexError("OGMGE: target must be in [0, C) or ignore_index (got another label)")
        if status & NON_FINITE_GRADIENT:
            raise RuntimeError("OGMGE: gradients must be finite (got NaN or inf in some)")

    def check_in_sync(self) -> None:
        """Raises if the ranks' seeds, step numbers, parameters or coefficients differ.

        For debugging: one all-gather of 48 bytes, read by the host. Does nothing on a single rank.

        Raises:
            RuntimeError: names what differs, with what each rank has.
        """
        self._join()
        if self._group is not None:
            _distributed.require_equal(
                "OGMGE.check_in_sync",
                {
                    "seed": self.seed,
                    "step": int(self._counter.item()),
                    "enabled": int(self.enabled),
                    "hash of alpha, noise and rule": _distributed.hash_of(
                        self.alpha, self.noise, self._rule_name
                    ),
                    "hash of the parameters' names": _distributed.hash_of(self._names),
                    "hash of the coefficients": _distributed.hash_of(self._state[2].tolist()),
                },
                self._group,
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit. Reads the step number from the device."""
        return {"seed": self.seed, "step": int(self._counter.item()), "enabled": self.enabled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: the mapping has other keys.
        """
        if set(state) != {"seed", "step", "enabled"}:
            raise ValueError(
                "OGMGE.load_state_dict: state must have the keys enabled, seed, step "
                f"(got {sorted(state)})"
            )
        self.seed = _checks.word64("OGMGE.load_state_dict", "seed", int(state["seed"]))
        self._counter.fill_(int(state["step"]))
        self.enabled = bool(state["enabled"])
        self._pending = False

    def __repr__(self) -> str:
        count = len(self._parameters)
        return (
            f"OGMGE({', '.join(self.modality_names)}; {count} parameters, alpha={self.alpha}, "
            f"noise={self.noise}, rule={self.rule!r})"
        )

    def _state_on(self, device: torch.device) -> Tensor:
        if self._state.device != device:
            self._allocate(device)
            self._pending = False
        return self._state

    def _allocate(self, device: torch.device) -> None:
        state = torch.ones(3, len(self.modality_names), device=device)
        self._state = state  # scores, ratios, coefficients
        self._skipped = torch.zeros((), dtype=torch.bool, device=device)
        never = torch.zeros_like(self._skipped)
        self._record = ModulationRecord(state[0], state[1], state[2], never)
        self._scaled_record = ModulationRecord(state[0], state[1], state[2], self._skipped)
        self._counter = self._counter.to(device)
        self._status = self._status.to(device)


def _collect(
    op: str, modalities: Mapping[str, nn.Module | list[Any]], select: Select
) -> tuple[list[nn.Parameter], list[int], list[str]]:
    """The selected parameters, once each, their modality's index, and their qualified names."""
    parameters: list[nn.Parameter] = []
    owners: list[int] = []
    names: list[str] = []
    seen: dict[int, int] = {}
    for index, (modality, value) in enumerate(modalities.items()):
        found = False
        named = _named(op, modality, value)
        found_here = [parameter for _, parameter in named]
        _distributed.refuse_flattened(op, f"modality '{modality}'", value, found_here)
        for name, parameter in named:
            if isinstance(parameter, nn.UninitializedParameter):
                raise ValueError(
                    f"{op}: parameters must have a shape before the method is made; pass a batch "
                    f"through the model first (got uninitialised '{modality}.{name}')"
                )
            if not select(name, parameter):
                continue
            found = True
            qualified = f"{modality}.{name}"
            first = seen.setdefault(id(parameter), len(parameters))
            if first == len(parameters):
                parameters.append(parameter)
                owners.append(index)
                names.append(qualified)
            elif owners[first] != index:
                raise ValueError(
                    f"{op}: a parameter must belong to one modality "
                    f"(got '{names[first]}' also as '{qualified}')"
                )
        if not found:
            raise ValueError(
                f"{op}: every modality must have a parameter that is selected (got none for "
                f"'{modality}'; by default those of two or more dimensions are)"
            )
    return parameters, owners, names


def _named(op: str, modality: str, value: nn.Module | list[Any]) -> list[tuple[str, nn.Parameter]]:
    if isinstance(value, nn.Module):
        # What wrappers add to the names goes, so that a run may resume with or without them.
        return [
            (name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""), parameter)
            for name, parameter in value.named_parameters()
        ]
    named = []
    for position, item in enumerate(value):
        name, parameter = item if isinstance(item, tuple) else (str(position), item)
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"{op}: modality '{modality}' must be a module, parameters or named parameters "
                f"(got {type(parameter).__name__} in it)"
            )
        named.append((name, parameter))
    return named  # type: ignore[return-value]


def _ids(names: list[str]) -> list[int]:
    """32-bit tensor ids from names: the same on every rank and in every process."""
    ids: dict[int, None] = {}
    for name in names:
        number = zlib.crc32(name.encode())
        while number in ids:  # the next free one, in the order of the names
            number = (number + 1) % 2**32
        ids[number] = None
    return list(ids)
