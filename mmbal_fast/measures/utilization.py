"""Conditional utilization rate: how much each branch's accuracy owes to the other branches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmbal_fast import _progress
from mmbal_fast.measures._branches import find_mmtms
from mmbal_fast.nn import MMTM

Logits: TypeAlias = Mapping[str, Tensor] | Sequence[Tensor]
"""One ``[B, C, ...]`` for each branch, in the order of the MMTMs' branches."""

_OP = "conditional_utilization"


@dataclass(frozen=True, eq=False)
class UtilizationTable:
    """What `conditional_utilization` measured; ``print`` shows it as a table.

    Attributes:
        names: names of the M branches.
        accuracy: float64 ``[M]`` on the CPU, in [0, 1]: each branch's accuracy ``A(f_j)``.
        accuracy_without: float64 ``[M, M]``: ``[i, j]`` is the accuracy of branch j while no branch
            sees branch i; NaN on the diagonal.
    """

    names: tuple[str, ...]
    accuracy: Tensor
    accuracy_without: Tensor

    @property
    def u(self) -> Tensor:
        """``[M, M]``: ``[i, j]`` is ``u(m_i | m_j)``, what branch j owes to branch i.

        Not clipped; NaN on the diagonal and where a branch has accuracy 0.
        """
        return (self.accuracy - self.accuracy_without) / self.accuracy

    @property
    def d_util(self) -> float:
        """``u(m_1 | m_0) - u(m_0 | m_1)``, for two branches.

        Raises:
            ValueError: more than two branches, for which the paper defines none.
        """
        if len(self.names) != 2:
            raise ValueError(
                f"UtilizationTable.d_util: there must be two branches (got {len(self.names)}); "
                "compare entries of u instead"
            )
        u = self.u
        return float(u[1, 0] - u[0, 1])

    def rate(self, of: str, *, given: str) -> float:
        """``u(of | given)`` by name.

        Raises:
            ValueError: an unknown name.
        """
        for name in (of, given):
            if name not in self.names:
                raise ValueError(
                    f"UtilizationTable.rate: branch must be one of {list(self.names)} (got {name})"
                )
        return float(self.u[self.names.index(of), self.names.index(given)])

    def __str__(self) -> str:
        """A table: a column for each branch; its accuracy, and its rate given each other."""
        labels = ["accuracy", *(f"u({name} | .)" for name in self.names)]
        left = max(map(len, labels))
        width = max(9, *(len(name) for name in self.names)) + 2
        lines = [" " * left + "".join(f"{name:>{width}}" for name in self.names)]
        for i, (label, row) in enumerate(
            zip(labels, [self.accuracy.tolist(), *self.u.tolist()], strict=True)
        ):
            cells = ("-" if j == i - 1 else f"{value:.4f}" for j, value in enumerate(row))
            lines.append(f"{label:<{left}}" + "".join(f"{cell:>{width}}" for cell in cells))
        if len(self.names) == 2:
            first, second = self.names
            lines.append(
                f"d_util = u({second} | {first}) - u({first} | {second}) = {self.d_util:+.4f}"
            )
        return "\n".join(lines)


@torch.no_grad()
def conditional_utilization(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    train_loader: Iterable[Any] | None = None,
    forward: Callable[[Any], tuple[Logits, Tensor]] | None = None,
    names: Sequence[str] | None = None,
    ignore_index: int = -100,
    progress: bool | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> UtilizationTable:
    """Measure how much each branch's accuracy owes to what the MMTMs tell it of the others.

    Wu et al., "Characterizing and Overcoming the Greedy Nature of Learning in Multi-modal Deep
    Neural Networks" (ICML 2022), conditional utilization rate::

        u(m_i | m_j) = (A(f_j) - A(f_j')) / A(f_j)          d_util = u(m_1 | m_0) - u(m_0 | m_1)

    ``A`` is accuracy, ``f_j`` the prediction of branch j, and ``f_j'`` its prediction when in every
    MMTM the squeezed vector of branch i is replaced by its mean over the training set, so that no
    branch sees it. One pass over ``train_loader`` records the means, one over ``loader``
    runs each batch ``1 + M`` times. Both in evaluation mode.

    The model is left as it was, also after an exception: training flags, buffers (running
    averages, switches), gradients and torch's global generators, which shuffling loaders draw
    from.

    Args:
        model: contains one or more `mmbal_fast.nn.MMTM`, all with M branches, and returns the
            logits of each branch: a mapping from names, or a sequence; in the order of the MMTMs'
            branches. Of a model wrapped in DistributedDataParallel give ``.module``.
        loader: batches to measure accuracy on, usually validation data. A batch is a sequence of
            inputs followed by labels, ``(x_0, ..., labels)``, called as ``model(x_0, ...)`` after
            moving tensors to the model's device. Labels are integers ``[B]``, or ``[B, ...]`` for
            logits ``[B, C, ...]``.
        train_loader: batches to average the squeezed vectors over; the paper takes the training
            set. Default: ``loader``, read twice.
        forward: for other batches or models: takes a batch, returns ``(logits, labels)`` with the
            logits as above, after running ``model`` itself.
        names: of the branches; default the keys of the logits, else ``branch 0``, ``branch 1``...
        ignore_index: labels that do not count; default -100.
        progress: show a progress bar on standard error, needs ``rich``. Default: if it is
            installed and standard error is a terminal.
        process_group: every rank measures its part of the data and all get the table of the whole:
            two all-reduces at the end of the passes, or one more for each further MMTM. Default:
            this process alone, so that one rank may evaluate while others do not.

    Returns:
        The table of ``u``, ``d_util``, accuracies, and a printable form. Negative rates are as they
        are: the branch is more often right without the others.

    Raises:
        ValueError: no MMTM, no batch, an MMTM that the model does not run, another number of
            logits than branches, or labels that do not fit the logits.
        TypeError: a batch, logits or labels of another type than described.
        ModuleNotFoundError: ``progress=True`` without ``rich``.

    Example:
        >>> import torch
        >>> from mmbal_fast import conditional_utilization
        >>> from mmbal_fast.nn import MMTM
        >>> model = MMTM([2, 2])  # each branch's two channels are its logits
        >>> for parameter in model.parameters():
        ...     _ = torch.nn.init.zeros_(parameter)
        >>> image, audio = torch.eye(2), torch.eye(2)[[0, 0]]
        >>> batch = (image, audio, torch.tensor([0, 1]))
        >>> print(conditional_utilization(model, [batch], names=["image", "audio"]))
                          image      audio
        accuracy         1.0000     0.5000
        u(image | .)          -     0.0000
        u(audio | .)     0.0000          -
        d_util = u(audio | image) - u(image | audio) = +0.0000
    """
    mmtms = find_mmtms(model, _OP)
    branches = len(mmtms[0].channels)
    if names is not None and len(names) != branches:
        raise ValueError(f"{_OP}: names must name {branches} branches (got {list(names)})")
    run = forward or (lambda batch: _run(model, batch))
    passes = [("squeezed means", loader if train_loader is None else train_loader)]
    passes.append(("utilization", loader))
    steps = [_progress.shown(batches, title, progress) for title, batches in passes]
    device = next(model.parameters()).device
    # Row 0: everything visible; row 1 + i: branch i hidden; last column: number of labels.
    counts = torch.zeros(1 + branches, branches + 1, dtype=torch.int64, device=device)
    with _preserved(model, mmtms):
        _record_means(mmtms, steps[0], run, process_group)
        for batch in steps[1]:
            for row in range(1 + branches):
                _hide(mmtms, row - 1 if row else None)
                logits, labels = run(batch)
                names, each = _branch_logits(logits, names, branches)
                counts[row] += _correct(each, labels, ignore_index)
        if process_group is not None:
            dist.all_reduce(counts, group=process_group)
    correct, total = counts[:, :-1].double().cpu(), counts[:, -1:].cpu()
    if names is None or not total.any():
        raise ValueError(f"{_OP}: loader must give labelled samples (got none)")
    accuracy = correct / total
    accuracy[1:].fill_diagonal_(torch.nan)
    return UtilizationTable(tuple(names), accuracy[0], accuracy[1:])


def _run(model: nn.Module, batch: Any) -> tuple[Logits, Tensor]:
    if not isinstance(batch, Sequence) or len(batch) < 2 or not isinstance(batch[-1], Tensor):
        raise TypeError(
            f"{_OP}: a batch must be a sequence (inputs..., labels), else give forward= "
            f"(got {type(batch).__name__})"
        )
    device = next(model.parameters()).device
    *inputs, labels = (x.to(device) if isinstance(x, Tensor) else x for x in batch)
    return model(*inputs), labels


def _record_means(
    mmtms: Sequence[MMTM],
    batches: Iterable[Any],
    run: Callable[[Any], tuple[Logits, Tensor]],
    process_group: dist.ProcessGroup | None,
) -> None:
    """Leave the mean squeezed vectors over all batches in ``running_squeeze``."""
    for mmtm in mmtms:
        mmtm.set_mode("normal")
        mmtm.reset_averages()
        mmtm.train()
    for batch in batches:
        run(batch)
    for mmtm in mmtms:
        mmtm.eval()
        if process_group is not None:
            sums = torch.cat([mmtm.running_squeeze, mmtm.running_squeeze.new_ones(1)]).double()
            sums *= mmtm.num_samples
            dist.all_reduce(sums, group=process_group)
            mmtm.running_squeeze.copy_(sums[:-1] / sums[-1])
            mmtm.num_samples.copy_(sums[-1])
        if not mmtm.num_samples:
            raise ValueError(
                f"{_OP}: every MMTM must run with finite features when the model does, and the "
                f"training loader give samples (got none for {mmtm})"
            )


def _hide(mmtms: Sequence[MMTM], branch: int | None) -> None:
    for mmtm in mmtms:
        mmtm.set_mode("normal")
        if branch is not None:
            mmtm.replace_squeeze[:, branch] = True


def _branch_logits(
    logits: Logits, names: Sequence[str] | None, branches: int
) -> tuple[Sequence[str], list[Tensor]]:
    if isinstance(logits, Mapping):
        names = list(logits) if names is None else names
        if set(names) != set(logits):
            raise ValueError(f"{_OP}: logits must be named {list(names)} (got {list(logits)})")
        logits = [logits[name] for name in names]
    if not isinstance(logits, Sequence):
        raise TypeError(
            f"{_OP}: the model must return a mapping or a sequence of logits, one for each branch, "
            f"else give forward= (got {type(logits).__name__})"
        )
    if len(logits) != branches:
        raise ValueError(
            f"{_OP}: the model must return logits for {branches} branches (got {len(logits)})"
        )
    for index, each in enumerate(logits):
        if not isinstance(each, Tensor):
            raise TypeError(
                f"{_OP}: the model must return a tensor of logits for each branch, else give "
                f"forward= (got {type(each).__name__} for branch {index})"
            )
    return names or [f"branch {m}" for m in range(branches)], list(logits)


def _correct(logits: Sequence[Tensor], labels: Tensor, ignore_index: int) -> Tensor:
    """int64 ``[M + 1]``: correct predictions of each branch, then the number of labels."""
    if labels.is_floating_point():
        raise TypeError(f"{_OP}: labels must be integers (got {labels.dtype})")
    counted = labels != ignore_index
    sums = []
    for each in logits:
        if each.ndim < 2 or each.shape[:1] + each.shape[2:] != labels.shape:
            raise ValueError(
                f"{_OP}: labels must be [B, ...] for logits [B, C, ...] "
                f"(got {list(labels.shape)} for {list(each.shape)})"
            )
        sums.append(((each.argmax(1) == labels) & counted).sum())
    return torch.stack([*sums, counted.sum()])


@contextmanager
def _preserved(model: nn.Module, mmtms: Sequence[MMTM]) -> Iterator[None]:
    """Evaluation mode and no synchronisation inside; everything as before afterwards."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    switches = [
        (switch, switch.clone())
        for mmtm in mmtms
        for switch in (mmtm.average_gate, mmtm.replace_squeeze)
    ]
    groups = [mmtm.process_group for mmtm in mmtms]
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(cuda)):
        try:
            model.eval()
            for mmtm in mmtms:
                mmtm.process_group = None
            yield
        finally:
            for module, flag in training:
                module.training = flag
            for module, name, buffer, saved in buffers:
                setattr(module, name, buffer.copy_(saved))
            for switch, saved in switches:
                switch.copy_(saved)
            for mmtm, group in zip(mmtms, groups, strict=True):
                mmtm.process_group = group
