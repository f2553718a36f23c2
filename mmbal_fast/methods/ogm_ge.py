"""OGM-GE: on-the-fly gradient modulation with generalization enhancement.

Peng, Wei, Deng, Wang, Hu, "Balanced Multimodal Learning via On-the-fly Gradient Modulation"
(CVPR 2022).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mmbal_fast.functional import _checks, _modulate, _scores
from mmbal_fast.functional._modulate import LABEL_OUT_OF_RANGE, NON_FINITE_GRADIENT, Update
from mmbal_fast.reference import Rule

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
    """float32 ``[M]``: summed softmax probability of the true class."""
    ratios: Tensor
    """float32 ``[M]``: discrepancy ratios; above 1 for a modality that dominates."""
    coefficients: Tensor
    """float32 ``[M]``: what the gradients were scaled by."""

    def clone(self) -> ModulationRecord:
        """A copy that later steps do not change."""
        return ModulationRecord(self.scores.clone(), self.ratios.clone(), self.coefficients.clone())


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
            default all ranks if torch.distributed is initialised.

    Raises:
        ValueError: fewer than two modalities, a modality without selected parameters, a parameter
            in two modalities, negative or NaN ``alpha`` or ``noise``, an unknown rule.
        TypeError: a modality that is no module and holds no parameters.

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
        process_group: Any = None,
    ) -> None:
        op = type(self).__name__
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
        self._parameters, self._modality, self._names = _collect(
            op, modalities, select or _select_weights
        )
        self._tensor_ids = _ids(self._names)
        self._pending = False  # scores observed since the last step
        self._state: Tensor | None = None  # [3, M] scores, ratios, coefficients
        self._counter = torch.zeros(1, dtype=torch.int64)  # steps done, on the state's device
        self._status = torch.zeros(1, dtype=torch.int32)
        self._process_group = process_group

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
        if logits.keys() != set(self.modality_names):
            raise ValueError(
                f"OGMGE.observe: logits must be given for {list(self.modality_names)} "
                f"(got {list(logits)})"
            )
        ordered = [logits[name] for name in self.modality_names]
        _checks.batch("OGMGE.observe", ordered, target)
        state = self._state_on(target.device)
        arguments = (
            state,
            ordered,
            target,
            ignore_index,
            self._pending,
            self.alpha if self.enabled else 0.0,
            self._rule_name,
            self._status,
        )
        if torch.compiler.is_compiling():
            torch.ops.mmbal.observe_(*arguments)
        else:
            _scores.observe_eager_(*arguments)
        self._pending = True

    def step(
        self,
        logits: Mapping[str, Tensor] | None = None,
        target: Tensor | None = None,
        *,
        ignore_index: int = -100,
        error_if_nonfinite: bool = False,
    ) -> ModulationRecord:
        """Modulates the gradients in place. Call it after ``backward`` and before the optimizer.

        Args:
            logits: as for `observe`, or None if `observe` was called for every micro-batch.
            target: as for `observe`.
            ignore_index: as for `observe`.
            error_if_nonfinite: read the gradients' moments back to the host and raise before
                anything is written, and raise for what `check` finds.

        Returns:
            Scores, ratios and coefficients, on the device. While `enabled` is False the gradients
            stay as they are and the coefficients are 1.

        Raises:
            RuntimeError: nothing was observed since the last step; a gradient whose elements share
                memory; with ``error_if_nonfinite``, a gradient that holds NaN or inf.
            ValueError: as for `observe`; only one of ``logits`` and ``target``; logits on the CPU
                with gradients elsewhere.
            TypeError: a gradient that is sparse, complex or integer.
        """
        if logits is not None and target is not None:
            self.observe(logits, target, ignore_index=ignore_index)
        elif logits is not None or target is not None:
            raise ValueError("OGMGE.step: logits and target must be given together (got one)")
        state = self._state
        if not self._pending or state is None:
            raise RuntimeError(
                "OGMGE.step: needs scores, from observe() or from logits and target "
                "(got none since the last step)"
            )
        if callable(self.rule):
            if self.enabled:
                state[2] = _scores.modulation_coefficients(state[1], 0.0, rule=self.rule)
            else:
                state[2] = 1.0
        if self.enabled:
            grads = [parameter.grad for parameter in self._parameters]
            moments = None
            if error_if_nonfinite:
                self.check()
                moments = _modulate.finite_moments("OGMGE.step", grads, None, self._names)
            _modulate.apply_(
                grads,
                Update(
                    coefficients=state[2],
                    modality=self._modality,
                    noise=self.noise,
                    seed=self.seed,
                    step=self._counter,
                    tensor_ids=self._tensor_ids,
                    moments=moments,
                    status=self._status,
                    advance=True,
                    names=self._names,
                ),
            )
        self._pending = False
        self.last = self._record
        return self._record

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
        state = self._state
        if state is None or state.device != device:
            state = torch.ones(3, len(self.modality_names), device=device)
            self._state = state
            self._record = ModulationRecord(state[0], state[1], state[2])
            self._counter = self._counter.to(device)
            self._status = self._status.to(device)
            self._pending = False
        return state


def _collect(
    op: str, modalities: Mapping[str, Parameters] | nn.ModuleDict, select: Select
) -> tuple[list[nn.Parameter], list[int], list[str]]:
    """The selected parameters, once each, their modality's index, and their qualified names."""
    parameters: list[nn.Parameter] = []
    owners: list[int] = []
    names: list[str] = []
    seen: dict[int, int] = {}
    for index, (modality, value) in enumerate(modalities.items()):
        found = False
        for name, parameter in _named(op, modality, value):
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


def _named(op: str, modality: str, value: Parameters) -> list[tuple[str, nn.Parameter]]:
    if isinstance(value, nn.Module):
        # What wrappers add to the names goes, so that a run may resume with or without them.
        return [
            (name.replace("_orig_mod.", ""), parameter)
            for name, parameter in value.named_parameters()
        ]
    named = []
    for position, item in enumerate([value] if isinstance(value, Tensor) else value):
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
