"""The ranks that measure and decide together."""

from __future__ import annotations

import copy
import zlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self


def are_many() -> bool:
    """Whether torch.distributed runs with other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Member:
    """What shares its numbers with other ranks, and what copies of it do.

    A copy joins the ranks again: process groups cannot be copied or pickled, and models that hold
    a member must be. A deep copy is of the same group. What is unpickled has to be told its group
    again, if one was given.

    Args:
        process_group: the ranks, or None for all, as DistributedDataParallel has it.
    """

    def __init__(self, process_group: ProcessGroup | None) -> None:
        self.process_group = process_group
        """The group given, or None for all ranks."""
        self._group: ProcessGroup | None = None  # with other ranks in it
        self._group_is_lost = False

    def _join(self) -> None:
        """Finds the other ranks, if there are any by now."""
        if self._group is not None:
            return
        if self._group_is_lost and self.process_group is None and are_many():
            raise RuntimeError(
                f"{type(self).__name__}: process_group must be assigned again after pickling, "
                "which groups do not survive (got None)"
            )
        self._group = resolve_group(self.process_group)
        if self._group is not None:
            self._joined(self._group)

    def _joined(self, group: ProcessGroup) -> None:
        """Called when the other ranks were found."""

    def _restore_views(self) -> None:
        """Makes the attributes again that view others: copies do not keep that."""

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_group_is_lost"] = self._group_is_lost or self.process_group is not None
        state["process_group"] = state["_group"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._restore_views()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.process_group, twin._group_is_lost = self.process_group, self._group_is_lost
        return twin


def resolve_group(group: ProcessGroup | None) -> ProcessGroup | None:
    """The ranks that share their numbers, or None where there are no others.

    Args:
        group: a group, or None for all ranks, as DistributedDataParallel has it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    return group if dist.get_world_size(group) > 1 else None


def broadcast_seed(seed: int, group: ProcessGroup) -> int:
    """The first rank's 64-bit seed, on every rank."""
    shared = torch.tensor([_signed(seed)], dtype=torch.int64, device=_device_of(group))
    dist.broadcast(shared, group_src=0, group=group)
    return int(shared.item()) % 2**64


def require_equal(op: str, values: dict[str, int], group: ProcessGroup) -> None:
    """Raises where a value differs between ranks.

    Args:
        op: who asks, for the error.
        values: by name; 64-bit integers or hashes. The names are the same on every rank.
        group: the ranks to compare.

    Raises:
        RuntimeError: names the values that differ, with what each rank has.
    """
    numbers = [_signed(value) for value in values.values()]
    mine = torch.tensor(numbers, dtype=torch.int64, device=_device_of(group))
    ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, mine, group=group)
    rows = torch.stack(ranks).t().tolist()
    differing = [
        f"{name} {[value % 2**64 for value in row]}"
        for name, row in zip(values, rows, strict=True)
        if len(set(row)) > 1
    ]
    if differing:
        raise RuntimeError(
            f"{op}: every rank must have the same state (got by rank {', '.join(differing)})"
        )


def hash_of(*values: object) -> int:
    """Of what they print as: for `require_equal`."""
    return zlib.crc32(repr(values).encode())


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _device_of(group: ProcessGroup) -> torch.device:
    """A device that the group's backend speaks."""
    types = [device.type for device in group._device_types]
    return torch.device("cpu" if "cpu" in types else types[0])
