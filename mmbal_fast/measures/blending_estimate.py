"""Offline Gradient-Blending: train each head alone, measure, restore."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from mmbal_fast import functional
from mmbal_fast.functional._blending_weights import check_floor
from mmbal_fast.reference._blending import FLOOR, increments
from mmbal_fast.training.method import checked_names
from mmbal_fast.training.snapshot import Snapshot, Stateful
from mmbal_fast.training.weighting import as_losses

Losses: TypeAlias = Mapping[str, Tensor | float] | Tensor | Sequence[float]


class BlendingEstimate(NamedTuple):
    """What `estimate_blending_weights` found; float64 ``[K]`` on the CPU. ``print`` shows a table.

    Attributes:
        names: names of the heads.
        generalization: ``dG``, by how much the validation loss of each head fell.
        overfitting: ``dO``, by how much its gap between validation and training loss grew.
        ratio: the overfitting-to-generalization ratio ``|dO / dG|``.
        weights: the weights to train with.
    """

    names: tuple[str, ...]
    generalization: Tensor
    overfitting: Tensor
    ratio: Tensor
    weights: Tensor

    def __str__(self) -> str:
        """A table with a row for each head."""
        width = max(len("head"), *map(len, self.names))
        lines = [f"{'head':{width}}" + "".join(f"{x:>9}" for x in ("dG", "dO", "OGR", "weight"))]
        for k, name in enumerate(self.names):
            values = (f"{each[k].item():9.4f}" for each in self[1:])
            lines.append(f"{name:{width}}" + "".join(values))
        return "\n".join(lines)


def estimate_blending_weights(
    model: nn.Module,
    heads: Sequence[str],
    train: Callable[[nn.Module, Tensor], object],
    evaluate: Callable[[nn.Module], tuple[Losses, Losses]],
    *,
    epochs: int,
    restore: Sequence[Stateful | torch.Generator] = (),
    floor: float = FLOOR,
    verbose: bool = True,
) -> BlendingEstimate:
    """Weights for Gradient-Blending, from training each head alone for a few epochs.

    Wang, Tran, Feiszli, "What Makes Training Multi-Modal Classification Networks Hard?"
    (CVPR 2020), algorithm 1: measure; for each head train with its loss only, measure again, go
    back; the weights follow from what each head gained and overfitted. Offline: once, before
    training. Online: at every super-epoch, from the model as it is then.

    Every head starts from the same state, that of the call, and that state is back when the
    function returns or raises, bit for bit: parameters, their gradients, buffers, modes, the random
    generators of Python, NumPy and torch (CPU and CUDA), and what is listed in ``restore``.

    Args:
        model: the model to train. At the first call its parameters must exist (no lazy modules).
        heads: names of the K >= 2 heads.
        train: ``train(model, weights)`` trains one epoch with the loss
            ``sum_k weights[k] L_k``; ``weights`` is float64 ``[K]`` on the device of the model, 1
            for one head and 0 for the others. Called ``epochs`` times for each head.
        evaluate: ``evaluate(model)`` returns the losses of all heads on the training set and on
            samples held out from it (never the test set), each ``[K]`` or by name: means over
            samples, of the model in evaluation mode. Called K + 1 times. With several ranks it must
            return the same numbers on each.
        epochs: number of epochs to train each head, n in the paper.
        restore: what the callbacks change beside the model: optimizers, schedulers, gradient
            scalers (all with ``state_dict`` and ``load_state_dict``), generators of data loaders.
        floor: see `mmbal_fast.functional.blending_weights`; default 0.1.
        verbose: show a progress bar on stderr, if ``rich`` is installed, and print the table.

    Returns:
        The weights and what they are made of.

    Warns:
        RuntimeWarning: no head gained, so that the weights are uniform.

    Raises:
        ValueError: fewer than two heads, a name given twice, ``epochs`` below 1, ``floor`` not a
            positive number, or losses that do not fit the heads.

    Example:
        >>> import torch
        >>> from mmbal_fast import estimate_blending_weights
        >>> model = torch.nn.Linear(2, 1, bias=False)  # the weights stand in for two heads
        >>> torch.nn.init.ones_(model.weight)
        Parameter containing:
        tensor([[1., 1.]], requires_grad=True)
        >>> def train(model, weights):
        ...     with torch.no_grad():
        ...         model.weight -= weights * torch.tensor([0.1, 0.2])
        >>> def evaluate(model):
        ...     validation = model.weight[0].detach()
        ...     return validation * torch.tensor([1.5, 2.0]), validation
        >>> heads = ["audio", "fused"]
        >>> estimate = estimate_blending_weights(model, heads, train, evaluate, epochs=2)
        head        dG       dO      OGR   weight
        audio   0.2000   0.1000   0.5000   0.8889
        fused   0.4000   0.4000   1.0000   0.1111
        >>> model.weight
        Parameter containing:
        tensor([[1., 1.]], requires_grad=True)
    """
    op = "estimate_blending_weights"
    names = checked_names(op, "heads", heads)
    check_floor(op, floor)
    if epochs < 1:
        raise ValueError(f"{op}: epochs must be at least 1 (got {epochs})")

    def measure() -> tuple[Tensor, Tensor]:
        on_train, on_validation = evaluate(model)
        return as_losses(op, names, on_train).cpu(), as_losses(op, names, on_validation).cpu()

    device = next((each.device for each in model.parameters()), None)
    one_hot = torch.eye(len(names), dtype=torch.float64, device=device)
    snapshot = Snapshot(model, restore)
    after = []
    try:
        with _progress(len(names) * epochs, verbose) as advance:
            train_before, val_before = measure()
            for k, name in enumerate(names):
                snapshot.restore()
                for epoch in range(epochs):
                    advance(f"{name}: epoch {epoch + 1} of {epochs}")
                    train(model, one_hot[k].clone())
                on_train, on_validation = measure()
                after.append((on_train[k], on_validation[k]))
    finally:
        snapshot.restore()
    train_after, val_after = (torch.stack(each) for each in zip(*after, strict=True))
    losses = train_before, val_before, train_after, val_after
    estimate = BlendingEstimate(
        names,
        *increments(*losses),
        functional.overfitting_to_generalization_ratio(*losses),
        functional.blending_weights(*losses, floor=floor),
    )
    if verbose:
        print(estimate)
    return estimate


@contextmanager
def _progress(total: int, visible: bool) -> Iterator[Callable[[str], None]]:
    """A function that says what begins now; ``total`` of them make the whole."""
    if visible:
        try:
            from rich.console import Console
            from rich.progress import Progress
        except ImportError:
            visible = False
    if not visible:
        yield lambda description: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        started = 0

        def advance(description: str) -> None:
            nonlocal started
            bar.update(task, description=description, completed=started)
            started += 1

        yield advance
