"""Multimodal transfer module with running averages and switchable gates."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class _Pickled:
    """Stands for a process group, which no process can hand to another."""

    of_all_ranks: bool


class MMTM(nn.Module):
    """Multimodal transfer module: each branch's channels are gated by what all branches see.

    Joze et al., "MMTM: Multimodal Transfer Module for CNN Fusion" (CVPR 2020), as used by
    Wu et al., "Characterizing and Overcoming the Greedy Nature of Learning in Multi-modal Deep
    Neural Networks" (ICML 2022), for any number of branches M. With feature maps
    ``x_m`` and their means over all positions ``z_m`` ("squeeze")::

        e     = relu(W [z_0, ..., z_{M-1}] + b)          width  2 * sum(channels) / ratio
        out_m = x_m * sigmoid(W_m e + b_m)               one gate for each channel

    In training the module keeps running averages of ``z_m`` and of each branch's gates, over all
    samples since construction or `reset_averages`. Evaluation leaves them alone.

    Two switches are tensors on the module's device, so that setting and using them never makes
    the host wait; `set_mode` sets both:

    - ``average_gate``, bool ``[M]``: where true, the branch's gates are replaced by their running
      average, this batch included, so that it learns from its own modality only. Acts in training
      only: evaluation in the middle of rebalancing shows the model as it will be used.
    - ``replace_squeeze``, bool ``[M, M]``: where ``[m, j]`` is true, the gates of branch m see the
      running average of ``z_j`` (without this batch) instead of ``z_j``. Acts in training and
      evaluation.

    Both are false at the start and are not part of the ``state_dict``, so they are no buffers
    either: a module that was made on the meta device starts with both false, whatever gives it its
    memory. The running averages are part of it: ``running_squeeze`` and ``running_gate``, each
    ``[sum(channels)]``, branch after branch, and ``num_samples``. A batch with NaN or Inf in
    squeeze or gates does not enter them.

    Args:
        channels: number of channels of each branch, at least two branches.
        ratio: the bottleneck has ``int(2 * sum(channels) / ratio)`` units, at least 1; default 4,
            as in the code of both papers.
        process_group: average over all samples of all ranks of this group, with one all-reduce in
            each forward in training. Every rank must then run the same number of forwards, which
            is why it is on request: by default each averages its own samples. For all ranks give
            ``torch.distributed.group.WORLD``, after ``init_process_group``. A deep copy has the
            same group. What was pickled, or saved whole, joins all ranks again if the group was
            theirs; any other must be assigned again before it trains.
        device: device of parameters and buffers.
        dtype: dtype of parameters and of the running averages.

    Raises:
        ValueError: fewer than two branches, a number of channels below 1, or a ratio not above 0.
        RuntimeError: in the forward in training, a module that was pickled with a group of some
            ranks, where there are ranks and none was assigned since.

    Example:
        >>> import torch
        >>> from mmbal_fast.nn import MMTM
        >>> mmtm = MMTM([8, 16])
        >>> image, audio = torch.randn(4, 8, 5, 5), torch.randn(4, 16, 7)
        >>> image, audio = mmtm(image, audio)
        >>> image.shape, audio.shape
        (torch.Size([4, 8, 5, 5]), torch.Size([4, 16, 7]))
        >>> mmtm.num_samples
        tensor(4)
    """

    process_group: dist.ProcessGroup | _Pickled | None
    running_squeeze: Tensor
    running_gate: Tensor
    num_samples: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        ratio: float = 4,
        *,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(channels) < 2:
            raise ValueError(f"MMTM: there must be at least two branches (got {len(channels)})")
        if min(channels) < 1:
            raise ValueError(f"MMTM: numbers of channels must be at least 1 (got {list(channels)})")
        if not ratio > 0:
            raise ValueError(f"MMTM: ratio must be above 0 (got {ratio})")
        self.channels = tuple(channels)
        self.ratio = ratio
        self.process_group = process_group
        total, branches = sum(channels), len(channels)
        width = max(1, int(2 * total / ratio))
        self.squeeze = nn.Linear(total, width, device=device, dtype=dtype)
        self.gates = nn.ModuleList(
            nn.Linear(width, count, device=device, dtype=dtype) for count in channels
        )
        zeros = torch.zeros(total, device=device, dtype=dtype)
        self.register_buffer("running_squeeze", zeros)
        self.register_buffer("running_gate", zeros.clone())
        self.register_buffer("num_samples", torch.zeros((), device=device, dtype=torch.int64))
        off = torch.zeros(branches, branches, device=device, dtype=torch.bool)
        # Plain attributes: as buffers they would be garbage in a module made on the meta device.
        self._average_gate = off[0].clone()
        self._replace_squeeze = off

    @property
    def average_gate(self) -> Tensor:
        """Bool ``[M]``: whose gates are averages in training. Written in place."""
        return self._switch("_average_gate")

    @property
    def replace_squeeze(self) -> Tensor:
        """Bool ``[M, M]``: ``[m, j]`` hides branch j from branch m's gates. Written in place."""
        return self._switch("_replace_squeeze")

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        """Gate every branch.

        Args:
            features: one tensor for each branch, ``[B, channels[m]]`` or ``[B, channels[m], ...]``.
                All have the same batch size; the other sizes may differ.

        Returns:
            The gated features, each with the shape and dtype of its input.

        Raises:
            ValueError: another number of branches or channels than the module was made for, a
                tensor without channels, or different batch sizes.
        """
        self._check(features)
        squeezed = torch.cat(
            [x.mean(dim=tuple(range(2, x.ndim))) if x.ndim > 2 else x for x in features], dim=1
        )
        channels = list(self.channels)
        means = torch.split(self.running_squeeze.to(squeezed.dtype), channels)
        # One row of channels for each receiving branch: [M, B, D].
        seen = torch.cat(
            [
                torch.where(hidden[:, None, None], mean, own)
                for hidden, mean, own in zip(
                    self.replace_squeeze.unbind(1),
                    means,
                    torch.split(squeezed, channels, 1),
                    strict=True,
                )
            ],
            dim=2,
        )
        excitation = torch.relu(self.squeeze(seen))
        gate = torch.sigmoid(
            torch.cat([layer(e) for layer, e in zip(self.gates, excitation, strict=True)], dim=1)
        )
        gates = torch.split(gate, channels, 1)
        if self.training:
            self._update_averages(squeezed.detach(), gate.detach())
            means = torch.split(self.running_gate, channels)
            gates = tuple(map(torch.where, self.average_gate, means, gates))
        return tuple(
            x * g.to(x.dtype).reshape(g.shape + (1,) * (x.ndim - 2))
            for x, g in zip(features, gates, strict=True)
        )

    def set_mode(
        self, mode: Literal["normal", "average_gate", "isolated"], branch: int | None = None
    ) -> None:
        """Set the switches for all branches, or for one.

        Args:
            mode: ``"normal"`` clears both switches of every branch. ``"average_gate"`` replaces
                the gates by their running average, in training. ``"isolated"`` replaces what the
                gates see of the other branches by its running average.
            branch: the branch that the mode is for; the others are normal. Default all.

        Raises:
            ValueError: an unknown mode, or a branch number outside [0, M).
        """
        if mode not in ("normal", "average_gate", "isolated"):
            raise ValueError(
                f"MMTM.set_mode: mode must be normal, average_gate or isolated (got {mode!r})"
            )
        if branch is not None and not 0 <= branch < len(self.channels):
            raise ValueError(
                f"MMTM.set_mode: branch must be in [0, {len(self.channels)}) (got {branch})"
            )
        self.average_gate.zero_()
        self.replace_squeeze.zero_()
        chosen = slice(None) if branch is None else slice(branch, branch + 1)
        if mode == "average_gate":
            self.average_gate[chosen] = True
        elif mode == "isolated":
            self.replace_squeeze[chosen] = True
            self.replace_squeeze.fill_diagonal_(False)

    def reset_averages(self) -> None:
        """Forget all samples seen so far."""
        for average in (self.running_squeeze, self.running_gate, self.num_samples):
            # Not zero_(): loaders of checkpoints make torch.nn.init spare what they have loaded.
            nn.init.zeros_(average)

    def reset_parameters(self) -> None:
        """Make all as at construction: layers drawn anew, averages forgotten, both switches off."""
        self.squeeze.reset_parameters()
        for layer in self.gates:
            layer.reset_parameters()  # type: ignore[operator]
        self.reset_averages()
        self.set_mode("normal")

    def bypass_parameters(self, branch: int) -> Iterator[nn.Parameter]:
        """Parameters that carry the other branches' information into one branch.

        Args:
            branch: number of the receiving branch.

        Yields:
            The parameters of the shared squeeze layer, then of this branch's gate layer.
        """
        yield from self.squeeze.parameters()
        yield from self.gates[branch].parameters()

    def extra_repr(self) -> str:
        """What ``print`` shows of the module."""
        return f"channels={list(self.channels)}, ratio={self.ratio}"

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: without the process group."""
        state = self.__dict__.copy()
        group = state["process_group"]
        if group is not None and not isinstance(group, _Pickled):
            state["process_group"] = _Pickled(of_all_ranks=group is dist.group.WORLD)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> MMTM:
        """With the same process group."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo[id(self.process_group)] = self.process_group
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        return twin

    def _switch(self, name: str) -> Tensor:
        switch: Tensor = getattr(self, name)
        device = self.running_squeeze.device
        if switch.device != device:
            switch = (
                torch.zeros_like(switch, device=device) if switch.is_meta else switch.to(device)
            )
            setattr(self, name, switch)
        return switch

    def _group(self) -> dist.ProcessGroup | None:
        group = self.process_group
        if not isinstance(group, _Pickled):
            return group
        if not (dist.is_available() and dist.is_initialized()):
            return None
        if not group.of_all_ranks:
            raise RuntimeError(
                "MMTM: process_group must be assigned again after pickling, which groups do not "
                f"survive (got {group})"
            )
        self.process_group = dist.group.WORLD
        return dist.group.WORLD

    def _check(self, features: tuple[Tensor, ...]) -> None:
        if len(features) != len(self.channels):
            raise ValueError(
                f"MMTM: there must be {len(self.channels)} branches (got {len(features)})"
            )
        for m, (x, count) in enumerate(zip(features, self.channels, strict=True)):
            if x.ndim < 2 or x.shape[1] != count:
                raise ValueError(
                    f"MMTM: branch {m} must be [B, {count}, ...] (got {list(x.shape)})"
                )
            if x.shape[0] != features[0].shape[0]:
                raise ValueError(
                    f"MMTM: all branches must have the batch size of branch 0, "
                    f"{features[0].shape[0]} (got {x.shape[0]} for branch {m})"
                )

    @torch.no_grad()
    def _update_averages(self, squeezed: Tensor, gate: Tensor) -> None:
        dtype = torch.promote_types(self.running_gate.dtype, torch.float32)
        samples = torch.cat([squeezed, gate], dim=1).to(dtype)
        packed = torch.cat([samples.sum(0), samples.new_full((1,), samples.shape[0])])
        group = self._group()
        if group is not None:
            dist.all_reduce(packed, group=group)
        sums, count = packed[:-1], packed[-1]
        total = self.num_samples + count.to(torch.int64)
        mean = torch.cat([self.running_squeeze, self.running_gate]).to(dtype)
        moved = mean + (sums - count * mean) / total.clamp(min=1)
        finite = torch.isfinite(packed).all()
        squeeze, gates = torch.where(finite, moved, mean).chunk(2)
        self.running_squeeze.copy_(squeeze)
        self.running_gate.copy_(gates)
        self.num_samples.copy_(torch.where(finite, total, self.num_samples))
