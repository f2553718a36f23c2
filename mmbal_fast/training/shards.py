"""Gradients that are spread over ranks: where their elements lie in the whole tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_INSTEAD = (
    "use torch.distributed.fsdp.fully_shard or DistributedDataParallel instead, whose gradients "
    "are there between backward and the optimizer's step"
)


def refuse_flattened(op: str, what: str, owner: object, parameters: Sequence[Tensor]) -> None:
    """Raises for parameters whose gradients are not there when a step needs them.

    FSDP1 keeps them in flat parameters that end anywhere in a tensor; DeepSpeed's ZeRO partitions
    them and steps inside ``backward``.

    Args:
        op: who asks, for the error.
        what: whose parameters they are, for the error.
        owner: the module that they were found in, or something else.
        parameters: what was found.

    Raises:
        TypeError: says what to use instead.
    """
    # FSDP1 with use_orig_params=False leaves the wrapped modules without parameters.
    emptied = isinstance(owner, nn.Module) and not parameters
    if emptied and getattr(owner, "_is_fsdp_managed_module", False):
        raise TypeError(
            f"{op}: {what} must not be flattened by FullyShardedDataParallel; "
            f"{_INSTEAD} (got a module without parameters of its own)"
        )
    for parameter in parameters:
        if hasattr(parameter, "_fsdp_flattened") or hasattr(parameter, "_is_flat_param"):
            wrapper = "FullyShardedDataParallel"
        elif any(hasattr(parameter, name) for name in ("ds_id", "ds_tensor", "_hp_mapping")):
            wrapper = "DeepSpeed's ZeRO"
        else:
            continue
        raise TypeError(
            f"{op}: {what} must not be flattened by {wrapper}; {_INSTEAD} "
            f"(got a {type(parameter).__name__} of shape {tuple(parameter.shape)})"
        )


@dataclass(frozen=True)
class Reduction:
    """Sums that make the moments of shards those of whole tensors."""

    groups: tuple[ProcessGroup, ...]
    """One per dimension of the mesh over which the tensors are sharded."""
    rows: Tensor
    """Of the moments, those of these tensors: positions on the device."""


@dataclass(frozen=True)
class ShardLayout:
    """Where the local elements of DTensor gradients lie in the whole tensors.

    A local block that is no contiguous range of the whole tensor, as a shard of columns, is a list
    of pieces that are, so that every element gets the noise that it has in the whole tensor.
    """

    parameters: list[int]
    """Of each piece: the position of its parameter."""
    offsets: list[int]
    """Of each piece: the index of its first element in the whole tensor."""
    depths: list[int]
    """Of each parameter: how many leading dimensions its pieces lie apart in."""
    counts: list[int]
    """Of each parameter: how many pieces it has."""
    reductions: list[Reduction]
    rows: Tensor
    """`parameters` on the device."""

    @staticmethod
    def of(op: str, parameters: Sequence[Tensor], names: Sequence[str]) -> ShardLayout | None:
        """The layout, or None if no parameter is a DTensor.

        Raises:
            ValueError: a placement that has no place in the whole tensor to speak of.
        """
        if not any(map(is_distributed, parameters)):
            return None
        rows: list[int] = []
        offsets: list[int] = []
        depths: list[int] = []
        counts: list[int] = []
        reductions: dict[tuple[ProcessGroup, ...], list[int]] = {}
        for row, (parameter, name) in enumerate(zip(parameters, names, strict=True)):
            depth, starts = 0, [0]
            if is_distributed(parameter):
                depth, starts = _pieces(op, parameter, name)
                groups = _shard_groups(parameter)
                if groups:
                    reductions.setdefault(groups, []).append(row)
            depths.append(depth)
            counts.append(len(starts))
            rows += [row] * len(starts)
            offsets += starts
        device = parameters[0].device
        return ShardLayout(
            rows,
            offsets,
            depths,
            counts,
            [
                Reduction(groups, torch.tensor(which, device=device))
                for groups, which in reductions.items()
            ],
            torch.tensor(rows, device=device),
        )

    @torch.no_grad()
    def local_gradients(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """This rank's elements of every gradient, which change with them."""
        return [local_gradient(parameter) for parameter in parameters]

    @torch.no_grad()
    def complete_(self, moments: Tensor) -> None:
        """Moments of local gradients become those of the whole tensors.

        One all-reduce of 3 T float64 if all T tensors are sharded over one group.

        Args:
            moments: float64 ``[T, 3]``, rows ``(count, mean, M2)``, in place.
        """
        for reduction in self.reductions:
            every = len(reduction.rows) == len(moments)
            part = moments if every else moments[reduction.rows]
            count, mean, m2 = part.unbind(1)
            # M2 about 0 is the one that sums. Taking the mean out again cancels (mean / std)^2 of
            # float64: at |mean| = 1e4 std an error of 1e-8 is left.
            sums = torch.stack([count, count * mean, m2 + count * mean * mean], dim=1)
            for group in reduction.groups:
                dist.all_reduce(sums, group=group)
            count, total, squares = sums.unbind(1)
            mean = total / count.clamp(min=1.0)
            whole = torch.stack([count, mean, (squares - total * mean).clamp(min=0.0)], dim=1)
            moments[reduction.rows] = whole

    @torch.no_grad()
    def sum_(self, rows: Tensor) -> None:
        """What was summed over local elements becomes the sum over those of the whole tensors.

        One all-reduce if all T tensors are sharded over one group.

        Args:
            rows: ``[T, ...]``, in place.
        """
        for reduction in self.reductions:
            every = len(reduction.rows) == len(rows)
            part = rows if every else rows[reduction.rows]
            for group in reduction.groups:
                dist.all_reduce(part, group=group)
            if not every:
                rows[reduction.rows] = part

    @torch.no_grad()
    def split(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The pieces of local gradients, views of them."""
        pieces: list[Tensor | None] = []
        for parameter, (gradient, count) in enumerate(zip(gradients, self.counts, strict=True)):
            if gradient is None:
                pieces += [None] * count
            else:
                pieces += self.split_one(gradient, parameter)
        return pieces

    @torch.no_grad()
    def zero_row_(self, gradient: Tensor, parameter: int, row: int, shape: Sequence[int]) -> None:
        """Sets to 0 what this rank has of a row of the whole tensor.

        Args:
            gradient: this rank's elements, as `local_gradients` gives them.
            parameter: its position.
            row: index into the first dimension of the whole tensor.
            shape: of the whole tensor.
        """
        if gradient.numel() == 0:
            return
        width = math.prod(shape[1:])
        first = sum(self.counts[:parameter])
        pieces = self.split_one(gradient, parameter)
        for offset, piece in zip(self.offsets[first:], pieces, strict=False):
            begin = max(row * width - offset, 0)
            end = min((row + 1) * width - offset, piece.numel())
            if begin < end:
                piece.view(-1)[begin:end].zero_()

    def split_one(self, gradient: Tensor, parameter: int) -> Sequence[Tensor]:
        """The pieces of one local gradient, views of it."""
        depth = self.depths[parameter]
        return gradient.flatten(0, depth - 1).unbind(0) if depth else [gradient]

    def per_piece(self, moments: Tensor | None) -> Tensor | None:
        """The rows of the parameters' moments that the pieces need."""
        if moments is None or len(self.parameters) == len(self.depths):
            return moments
        return moments[self.rows]


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor; without importing what few trainings need."""
    return hasattr(tensor, "placements")


def shard_count(tensor: Any) -> int:
    """Over how many ranks the elements are spread; 1 where every rank has all of them."""
    groups = _shard_groups(tensor) if is_distributed(tensor) else ()
    return math.prod(group.size() for group in groups)


def local_part(tensor: Any) -> Tensor:
    """This rank's elements of a tensor, which change with it."""
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[no-any-return]


def local_gradient(parameter: Any) -> Tensor | None:
    """This rank's elements of a parameter's gradient; None if it has none, or is frozen."""
    gradient: Any = parameter.grad if parameter.requires_grad else None
    if gradient is None or not is_distributed(parameter):
        return gradient  # type: ignore[no-any-return]
    if gradient.placements != parameter.placements:  # sums that are still to be taken
        gradient = gradient.redistribute(placements=parameter.placements)
        parameter.grad = gradient
    local: Any = gradient.to_local()
    if not local.is_contiguous() and local.shape != gradient.shape:
        parameter.grad = gradient = gradient.contiguous()
        local = gradient.to_local()
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def _shard_groups(parameter: Any) -> tuple[ProcessGroup, ...]:
    mesh = parameter.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(parameter.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def _pieces(op: str, parameter: Any, name: str) -> tuple[int, list[int]]:
    """How many leading dimensions the local block's ranges lie apart in, and where they start."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, placements, mesh = parameter.shape, parameter.placements, parameter.device_mesh
    if not all(_is_block(parameter, mesh_dim) for mesh_dim in range(len(placements))):
        raise ValueError(
            f"{op}: parameter '{name}' must be replicated or sharded in blocks "
            f"(got {placements} of shape {tuple(shape)} on a mesh of {tuple(mesh.shape)})"
        )
    local, first = compute_local_shape_and_global_offset(shape, mesh, placements)
    if math.prod(local) == 0:
        return 0, [0]
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    partial = [dim for dim in range(len(shape)) if local[dim] != shape[dim]]
    depth = partial[-1] if partial else 0
    starts = [sum(index * stride for index, stride in zip(first, strides, strict=True))]
    for dim in range(depth):
        starts = [start + i * strides[dim] for start in starts for i in range(local[dim])]
    return depth, starts


def _is_block(parameter: Any, mesh_dim: int) -> bool:
    """Whether what a placement leaves of a tensor's dimension is one range of it."""
    placement = parameter.placements[mesh_dim]
    dim = getattr(placement, "dim", None)
    if dim is None:
        return bool(placement.is_replicate())
    # FSDP2 over tensor parallelism of the same dimension: listed first, but sharded last.
    split_factor = getattr(placement, "split_factor", 1)
    mesh = parameter.device_mesh
    inner = math.prod(
        mesh.size(other)
        for other in range(mesh_dim + 1, mesh.ndim)
        if getattr(parameter.placements[other], "dim", None) == dim
    )
    even = parameter.shape[dim] % (mesh.size(mesh_dim) * inner) == 0
    return bool(split_factor == 1 or (even and split_factor == inner))
