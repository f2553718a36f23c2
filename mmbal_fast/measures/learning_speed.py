"""Conditional learning speed: how fast each branch learns from the other branches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbal_fast.functional._accumulate_speeds import accumulate_speeds_
from mmbal_fast.functional._gradient_moments import moments_of
from mmbal_fast.measures._branches import (
    Parameters,
    find_mmtms,
    main_parameters,
    modules_of,
    parameters_of,
)
from mmbal_fast.training.method import checked_names, tensor
from mmbal_fast.training.parameters import Watch
from mmbal_fast.training.ranks import Member
from mmbal_fast.training.shards import (
    is_distributed,
    local_gradient,
    refuse_flattened,
    shard_count,
)


class ConditionalLearningSpeed(Member):
    """How fast each branch learns from the others, relative to learning from its own modality.

    Wu et al., "Characterizing and Overcoming the Greedy Nature of Learning in Multi-modal Deep
    Neural Networks" (ICML 2022), conditional learning speed. With
    ``mu(theta) = ||grad||^2 / ||theta||^2``, summed over the steps::

        s_m = log10( sum_t mu(bypass_m) / sum_t mu(main_m) )

    ``main_m`` are branch m's own parameters, ``bypass_m`` those that carry the other branches'
    information into it: the gate layers of m and the shared squeeze layers of the MMTMs. A
    parameter that is frozen or has no gradient counts with gradient 0 and stays in the norm of its
    group.
    A step with a non-finite ``mu`` is left out. Everything is float64 on the device of the
    parameters, and no method but the constructor makes the host wait.

    Gradients may be scaled by a constant: it cancels. With ``torch.amp.GradScaler``, whose scale
    changes, call `update` after ``unscale_``.

    Args:
        main: own parameters of each branch: for each name a module, parameters, named parameters,
            or a sequence of these. At least two branches; no parameter in two of them.
        bypass: the same names; parameters may be shared between branches, not with ``main``.
        process_group: whose ranks measure together, so that all have the same speeds; default all
            ranks if torch.distributed is initialised, as in `OGMGE`. One all-reduce of the squared
            norms for each update: ``2 T`` float64 for T parameters. Parameters may be replicated
            or sharded (FSDP2) over ranks of the group. Made before torch.distributed is
            initialised, the object joins at its first update.

    Raises:
        ValueError: fewer than two branches, different names in ``main`` and ``bypass``, a group
            without parameters or whose weights are all zero, a parameter in two groups that may
            not share, or one that is sharded over ranks outside ``process_group``.
        TypeError: a value that is not made of modules and parameters, or whose parameters are
            flattened by FSDP1 or partitioned by DeepSpeed's ZeRO.

    Example:
        >>> import torch
        >>> from mmbal_fast import ConditionalLearningSpeed
        >>> theta = {name: torch.nn.Parameter(torch.ones(2)) for name in "abcd"}
        >>> speed = ConditionalLearningSpeed(
        ...     main={"image": theta["a"], "audio": theta["b"]},
        ...     bypass={"image": theta["c"], "audio": theta["d"]},
        ... )
        >>> (theta["a"] + theta["b"] + 10 * theta["c"] + theta["d"]).sum().backward()
        >>> speed.update()
        tensor(True)
        >>> speed.speed
        tensor([2., 0.], dtype=torch.float64)
        >>> speed.difference
        tensor([ 2., -2.], dtype=torch.float64)
    """

    _branches: Mapping[str, Parameters] | None = None

    def __init__(
        self,
        *,
        main: Mapping[str, Parameters],
        bypass: Mapping[str, Parameters],
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(process_group)
        op = "ConditionalLearningSpeed"
        self.names = checked_names(op, "main", main)
        """Of the branches, in the order of every ``[M]``."""
        if set(main) != set(bypass):
            raise ValueError(
                f"{op}: bypass must name the branches of main, {list(main)} (got {list(bypass)})"
            )
        self._model: nn.Module | None = None
        self._given = _listed(main), _listed(bypass)
        self._look()
        self._join()
        self._count_shares()
        count = len(self.names)
        device = self._moments.device
        contrast = torch.full((count, count), -1.0 / (count - 1), dtype=torch.float64, device="cpu")
        self._contrast = contrast.fill_diagonal_(1.0).to(device)
        self._totals = torch.zeros(2, count, dtype=torch.float64, device=device)
        if self._parameters[0].is_meta:
            return  # without weights yet
        weights = _squared_norm(self._measure([None] * len(self._parameters))[0])
        # Not a matrix product: 0 * inf would spoil the groups that a tensor is not in.
        norms = torch.where(self._membership > 0, self._membership * weights, 0.0).sum(1)
        for label, norm in zip(self._labels(), norms.tolist(), strict=True):
            if not (math.isfinite(norm) and norm > 0):
                raise ValueError(
                    f"{op}: the weights of {label} must have a squared norm that is finite and "
                    f"above 0 (got {norm})"
                )

    def _labels(self) -> list[str]:
        return [f"{kind}[{name!r}]" for kind in ("bypass", "main") for name in self.names]

    def _look(self) -> None:
        """Finds the parameters of each group where the modules hold them now."""
        op = "ConditionalLearningSpeed"
        main, bypass = self._given
        if self._model is not None:
            main, bypass = _groups(self._model, self._branches, op)
        values = [*(bypass[name] for name in main), *main.values()]
        labels = self._labels()
        groups = {
            label: parameters_of(value, f"{op}: {label}")
            for label, value in zip(labels, values, strict=True)
        }
        for (label, parameters), value in zip(groups.items(), values, strict=True):
            refuse_flattened(op, label, value, parameters)
        members: dict[Tensor, list[int]] = {}
        for row, (label, parameters) in enumerate(groups.items()):
            if not parameters:
                raise ValueError(f"{op}: {label} must hold parameters (got none)")
            for parameter in parameters:
                rows = members.setdefault(parameter, [])
                if rows and row >= len(main):
                    raise ValueError(
                        f"{op}: main groups must share no parameter with another group "
                        f"(got {list(parameter.shape)} in {labels[rows[0]]} and {label})"
                    )
                rows.append(row)
        self._parameters = list(members)
        self._sharded = any(map(is_distributed, members))
        home = self._parameters[0].device
        device = torch.device("cpu") if home.type == "meta" else home
        membership = torch.zeros(len(labels), len(members), dtype=torch.float64, device="cpu")
        for column, rows in enumerate(members.values()):
            membership[rows, column] = 1.0
        self._whole_membership = membership.to(device)
        # Kept, so that a step allocates nothing. Rows of None and of empty tensors stay zero.
        self._moments = torch.zeros(2, len(members), 3, dtype=torch.float64, device=device)
        self._missing = [True] * len(members)  # gradients
        trees = modules_of([self._model] if self._model is not None else values)
        self._watch: Watch | None = Watch(trees, self._parameters)

    def _follow(self) -> bool:
        """Looks again if a module holds other parameters than before; whether it did."""
        changed = self._watch is None or self._watch.changed()
        if changed:
            self._look()
            self._count_shares()
            device = self._moments.device
            self._contrast, self._totals = self._contrast.to(device), self._totals.to(device)
        return changed

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        branches: Mapping[str, Parameters] | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> ConditionalLearningSpeed:
        """Assign the parameters of a model with MMTMs by module.

        Args:
            model: contains one or more `mmbal_fast.nn.MMTM`, all with M branches.
            branches: the branches' own modules (encoder, classifier), **in the order in which the
                MMTMs take the branches**: for each name a module, parameters, or a sequence of
                these. Parameters of MMTMs inside them do not count. Default: the children of
                ``model`` that have parameters outside the MMTMs, in the order of registration;
                there must be M of them. Wrappers around a single child are looked through.
            process_group: as in the constructor.

        Returns:
            The measure, with the squeeze and gate layers of all MMTMs as ``bypass``.

        Raises:
            ValueError: no MMTM, MMTMs with different numbers of branches, or a number of branches
                other than M; and what the constructor raises.

        Example:
            >>> import torch
            >>> from mmbal_fast import ConditionalLearningSpeed
            >>> from mmbal_fast.nn import MMTM
            >>> model = torch.nn.ModuleDict({
            ...     "image": torch.nn.Linear(8, 4), "audio": torch.nn.Linear(5, 4),
            ...     "mmtm": MMTM([4, 4]),
            ... })
            >>> ConditionalLearningSpeed.from_model(model).names
            ('image', 'audio')
        """
        op = "ConditionalLearningSpeed.from_model"
        branches = None if branches is None else _listed(branches)
        main, bypass = _groups(model, branches, op)
        speed = cls(main=main, bypass=bypass, process_group=process_group)
        speed._model, speed._branches = model, branches
        speed._watch = Watch([model], speed._parameters)
        return speed

    @torch.no_grad()
    def update(self, *, active: Tensor | None = None) -> Tensor:
        """Add this step's ``mu``; call after ``backward`` and before the optimizer's step.

        Args:
            active: bool ``[]`` on the device of the parameters; where false, nothing is added.
                Default: add.

        Returns:
            bool ``[]``: whether all ``mu`` of this step are finite.

        Raises:
            RuntimeError: no parameter has a gradient. On many ranks such a rank takes part instead,
                with gradients of 0, since the others wait for it.
        """
        self._join()
        self._follow()
        if self._sharded:
            gradients = [local_gradient(each) for each in self._parameters]
        else:  # a frozen parameter may hold an old gradient
            gradients = [each.grad if each.requires_grad else None for each in self._parameters]
        missing = [gradient is None for gradient in gradients]
        if self._group is None and all(missing):
            raise RuntimeError(
                "ConditionalLearningSpeed.update: must come between backward and zero_grad "
                f"(got no gradient on {len(gradients)} parameters)"
            )
        if missing != self._missing:  # rows of what is gone
            self._missing = missing
            self._moments[1].zero_()
        moments = self._measure(gradients)
        return accumulate_speeds_(moments, self._membership, self._totals.view(-1), active)

    @property
    def speed(self) -> Tensor:
        """``s_m``, float64 ``[M]``; NaN before the first update."""
        return torch.log10(self._totals[0] / self._totals[1])

    @property
    def difference(self) -> Tensor:
        """Each branch's speed minus the mean speed of the others, float64 ``[M]``.

        For two branches ``[d, -d]``, where ``d`` is the paper's ``d_speed = s_0 - s_1``.
        """
        return self._compared(self.speed)

    def _compared(self, speed: Tensor) -> Tensor:
        """Each speed minus the mean of the others, ``[M]``; not finite where one of them is not."""
        return torch.mv(self._contrast, speed)

    def reset(self) -> None:
        """Forget all steps."""
        self._totals.zero_()

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: the names of the branches and the sums of ``mu``."""
        return {"names": list(self.names), "totals": self._totals.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume; the branches must be those of the saved state.

        Raises:
            ValueError: other keys, other branches, or sums that no state has. Nothing changes then.
            TypeError: sums that are no numbers. Nothing changes then.
        """
        op = "ConditionalLearningSpeed.load_state_dict"
        if set(state_dict) != {"names", "totals"}:
            raise ValueError(
                f"{op}: state must have the keys names, totals (got {sorted(state_dict)})"
            )
        if list(state_dict["names"]) != list(self.names):
            raise ValueError(
                f"{op}: names must be {list(self.names)} (got {list(state_dict['names'])})"
            )
        self._load_totals(op, state_dict["totals"])

    def _load_totals(self, op: str, totals: Any) -> None:
        values = tensor(op, "totals", totals, self._totals)
        if bool((values < 0).any()):
            raise ValueError(f"{op}: totals must not be negative (got {values.tolist()})")
        self._totals.copy_(values)

    def _joined(self, group: dist.ProcessGroup) -> None:
        self._count_shares()

    def _count_shares(self) -> None:
        """What this rank counts of each parameter's squared norm, as the ranks sum theirs."""
        for parameter in self._parameters if self._sharded else ():
            self._require_all_shards(parameter)
        self._membership = self._whole_membership
        if self._group is not None:
            size = self._group.size()
            shares = [shard_count(parameter) / size for parameter in self._parameters]
            self._membership = self._whole_membership * self._membership.new_tensor(shares)

    def __getstate__(self) -> dict[str, Any]:
        """Without what names parameters: the copy's modules hold others."""
        return super().__getstate__() | {"_watch": None}

    def _require_all_shards(self, parameter: Any) -> None:
        if shard_count(parameter) == 1:
            return
        group = (
            [dist.get_rank()] if self._group is None else dist.get_process_group_ranks(self._group)
        )
        mesh = parameter.device_mesh.mesh.flatten().tolist()
        if not set(mesh) <= set(group):
            raise ValueError(
                "ConditionalLearningSpeed: process_group must hold all ranks of a sharded "
                f"parameter (got ranks {group} for {list(parameter.shape)} on ranks {mesh})"
            )

    def _measure(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Moments of the weights and of the gradients, ``[2, T, 3]``, of all ranks together."""
        weights: list[Any] = self._parameters
        if self._sharded:
            weights = [each.to_local() if is_distributed(each) else each for each in weights]
        moments = moments_of([*weights, *gradients], out=self._moments.view(-1, 3))
        if self._group is not None:
            norms = _squared_norm(moments)
            dist.all_reduce(norms, group=self._group)
            moments = torch.nn.functional.pad(norms.unsqueeze(1), (2, 0))  # rows (0, 0, norm)
        return moments.view_as(self._moments)


def _groups(
    model: nn.Module, branches: Mapping[str, Parameters] | None, op: str
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Main and bypass parameters of a model with MMTMs."""
    mmtms = find_mmtms(model, op)
    main = main_parameters(model, mmtms, branches, op)
    bypass: dict[str, list[Tensor]] = {
        name: [parameter for mmtm in mmtms for parameter in mmtm.bypass_parameters(m)]
        for m, name in enumerate(main)
    }
    return main, bypass


def _listed(groups: Mapping[str, Parameters]) -> dict[str, Any]:
    """Values that can be looked at twice, as iterators cannot."""
    return {
        name: value if isinstance(value, nn.Module | Tensor | str) else list(value)
        for name, value in groups.items()
    }


def _squared_norm(moments: Tensor) -> Tensor:
    count, mean, m2 = moments.unbind(-1)
    return m2 + count * mean.square()
