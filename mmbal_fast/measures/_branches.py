"""Which parameters of a model with MMTMs belong to which branch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from torch import Tensor, nn

from mmbal_fast.nn import MMTM

Parameters: TypeAlias = nn.Module | Tensor | Iterable[nn.Module | Tensor | tuple[str, Tensor]]
"""A module, a parameter, or several modules, parameters or named parameters."""


def parameters_of(value: Parameters, rule: str) -> list[Tensor]:
    """All parameters in ``value``, each once; ``rule`` opens the error message."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.Module):
        return list(value.parameters())
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{rule} must be modules or parameters (got {value!r})")
    found: dict[Tensor, None] = {}
    for entry in value:
        part = entry[1] if isinstance(entry, tuple) else entry
        if not isinstance(part, nn.Module | Tensor):
            raise TypeError(f"{rule} must be modules or parameters (got {part!r})")
        found.update(dict.fromkeys(parameters_of(part, rule)))
    return list(found)


def modules_of(values: Iterable[Parameters]) -> list[nn.Module]:
    """The modules among what was given."""
    found: list[nn.Module] = []
    for value in values:
        if isinstance(value, nn.Module):
            found.append(value)
        elif not isinstance(value, Tensor):
            found += [entry for entry in value if isinstance(entry, nn.Module)]
    return found


def find_mmtms(model: nn.Module, op: str) -> list[MMTM]:
    """The MMTMs of a model, which must all join the same number of branches."""
    mmtms = [module for module in model.modules() if isinstance(module, MMTM)]
    if not mmtms:
        raise ValueError(
            f"{op}: model must contain an mmbal_fast.nn.MMTM (got {type(model).__name__} with none)"
        )
    counts = sorted({len(mmtm.channels) for mmtm in mmtms})
    if len(counts) > 1:
        raise ValueError(f"{op}: all MMTMs must join the same number of branches (got {counts})")
    return mmtms


def main_parameters(
    model: nn.Module, mmtms: list[MMTM], branches: Mapping[str, Parameters] | None, op: str
) -> dict[str, list[Tensor]]:
    """Each branch's own parameters, without those of the MMTMs, in the order of the branches."""
    transfer = {parameter for mmtm in mmtms for parameter in mmtm.parameters()}
    count = len(mmtms[0].channels)
    if branches is None:
        branches = _children(model, transfer)
        if len(branches) != count:
            raise ValueError(
                f"{op}: model must have one child module for each of the {count} branches of its "
                f"MMTMs, else give branches= (got {', '.join(branches) or 'none'})"
            )
    elif len(branches) != count:
        raise ValueError(
            f"{op}: branches must name the {count} branches of the MMTMs "
            f"(got {', '.join(branches) or 'none'})"
        )
    return {
        name: [p for p in parameters_of(value, f"{op}: branches[{name!r}]") if p not in transfer]
        for name, value in branches.items()
    }


def _children(model: nn.Module, transfer: set[nn.Parameter]) -> dict[str, nn.Module]:
    """Children with parameters of their own; wrappers around a single child are looked through."""
    children = {
        name: child
        for name, child in model.named_children()
        if any(parameter not in transfer for parameter in child.parameters())
    }
    if len(children) == 1:
        return _children(next(iter(children.values())), transfer) or children
    return children
