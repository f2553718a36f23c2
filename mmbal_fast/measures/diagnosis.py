"""Which encoder is behind, and what the fusion makes of each modality."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbal_fast import _progress, _task
from mmbal_fast._task import FusionModel, Loader
from mmbal_fast.fusion import TypicalityGate
from mmbal_fast.measures._probe import probe
from mmbal_fast.nn._late_fusion import evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGIN = 1.0
"""Points of accuracy from which on a gap is called one, if it is beyond two standard errors."""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` measured. Tensors are float64 ``[M]`` on the CPU, accuracies in per cent."""

    names: tuple[str, ...]
    """The modalities, in the order of every ``[M]``."""
    epochs: int
    """How long each encoder was trained alone."""
    samples: int
    """Validation samples."""
    fused: float
    """Accuracy of the model."""
    probe: Tensor
    """Accuracy of a linear probe of each encoder of the model."""
    alone: Tensor
    """The same of that encoder trained alone."""
    gap: Tensor
    """``alone - probe``: what the encoder would know if the others were not there."""
    gap_error: Tensor
    """Its standard error, paired by validation sample; says nothing of another training run."""
    share: Tensor
    """Of each modality in the fused logits; they add up to 1.

    How far the logits move, centred over the classes, if the modality's features become their
    training mean: the norm of that, averaged over the samples.
    """
    muted: Tensor
    """Accuracy of the model with that modality's features at their training mean."""
    shuffled: Tensor
    """Accuracy of the model with that modality's features from other validation samples."""
    typicality: Tensor
    """Mean ``log q`` of `mmbal_fast.fusion.TypicalityGate`, with the training inputs as reference.

    -1 if validation inputs look to the encoder like those it was trained on. Lower is a shift, or
    an encoder that has learnt its training inputs by heart. NaN if it could not be measured: a
    class without training samples, or features that do not vary.
    """

    @property
    def under_trained(self) -> tuple[str, ...]:
        """Modalities with a gap of ``MARGIN`` points and two standard errors, worst first."""
        behind = (self.gap >= MARGIN) & (self.gap > 2 * self.gap_error)
        worst = self.gap.argsort(descending=True).tolist()
        return tuple(self.names[m] for m in worst if behind[m])

    @property
    def advice(self) -> str:
        """One sentence with the measurement behind it."""
        behind = self.under_trained
        worst = self.names.index(behind[0]) if behind else int(self.gap.argmax())
        name = self.names[worst]
        gap = f"{self.gap[worst]:.1f} ± {self.gap_error[worst]:.1f} points"
        if not behind:
            return (
                "Nothing is wrong that these data can show: no encoder is behind the same encoder "
                f"trained alone (largest gap: {name}, {gap}); whether a modality misleads "
                "elsewhere, their labels cannot tell."
            )
        return (
            f"{' and '.join(behind)} {'are' if behind[1:] else 'is'} under-trained: a linear probe "
            f"of the {name} encoder gets {self.probe[worst]:.1f} % of {self.samples} validation "
            f"samples right, of the same encoder trained alone for {self.epochs} epochs "
            f"{self.alone[worst]:.1f} % (gap {gap}), so give each modality a loss of its own or "
            "balance the gradients; whether the fusion should then trust it more, the labels of "
            "these data cannot tell."
        )

    def __str__(self) -> str:
        """A table of at most 80 columns, and the advice."""
        left = max(map(len, ("modality", *self.names)))
        lines = [
            f"{'modality':<{left}}  probe  alone          gap  share  muted  shuffled  typicality"
        ]
        for m, name in enumerate(self.names):
            cells = (
                f"{self.probe[m]:5.1f}",
                f"{self.alone[m]:5.1f}",
                f"{self.gap[m]:+5.1f} ± {self.gap_error[m]:.1f}",
                f"{self.share[m]:5.2f}",
                f"{self.muted[m]:5.1f}",
                f"{self.shuffled[m]:8.1f}",
                "         -" if self.typicality[m].isnan() else f"{self.typicality[m]:10.2f}",
            )
            lines.append("  ".join([f"{name:<{left}}", *cells]))
        lines.append(f"{'fused':<{left}}  {self.fused:5.1f}   % of {self.samples} samples")
        return "\n".join([*lines, self.advice])

    def plot(self) -> Figure:
        """Draw each encoder beside itself trained alone, and what the model owes to it.

        Returns:
            A matplotlib figure; ``figure.savefig("diagnosis.png")`` writes it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.6), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 2))
        places = torch.arange(len(self.names), dtype=torch.float64)
        both = {"in the model": self.probe, "trained alone": self.alone}
        without = {"muted": self.muted, "shuffled": self.shuffled}
        for axes, bars in ((left, both), (middle, without)):
            for side, (label, values) in zip((-0.2, 0.2), bars.items(), strict=True):
                axes.bar((places + side).tolist(), values.tolist(), width=0.38, label=label)
            axes.set(ylim=(0, 100), xticks=places.tolist(), xticklabels=self.names)
        left.errorbar(
            (places + 0.2).tolist(),
            self.alone.tolist(),
            yerr=(2 * self.gap_error).tolist(),
            fmt="none",
            ecolor="black",
            capsize=3,
            label="2 s.e. of the gap",
        )
        left.set(title="linear probe of the encoder", ylabel="validation accuracy, %")
        middle.axhline(self.fused, color="black", linewidth=0.8, label="all as they are")
        middle.set(title="the model, that modality")
        right.bar(places.tolist(), self.share.tolist(), width=0.6, color="0.5")
        right.set(title="share of the logits", ylim=(0, 1))
        right.set(xticks=places.tolist(), xticklabels=self.names)
        for axes in (left, middle):
            axes.legend(loc="lower center", fontsize="small")
        return figure


@torch.inference_mode(False)
@torch.no_grad()
def diagnose(
    model: FusionModel,
    train_loader: Loader,
    val_loader: Loader,
    *,
    epochs: int,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    fresh: Callable[[str], nn.Module] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Diagnosis:
    """Say which encoder of a network is under-trained, and how much the network leans on each.

    Needs validation data with labels, from where the training data come from. It tells whether
    joint training held an encoder back. It does not tell which modality to trust on other data: a
    shortcut that works on the validation data looks like knowledge.

    Each encoder is trained anew on its own, with a linear layer behind it, for the same number of
    epochs. Then the features of the model's encoder and of that one are frozen, and the same linear
    probe reads the labels off both: the gap between them is what the encoder owes to imbalance, as
    in Peng et al., "Balanced Multimodal Learning via On-the-fly Gradient Modulation" (CVPR 2022),
    section 1. The probe is logistic regression with a strong penalty (``docs/diagnose.md``).

    Costs M trainings of one encoder and four passes over the data; holds the features of all
    samples in memory. One process only. The model, its mode and torch's generators are left as they
    were, except for a generator of the loader's own.

    Args:
        model: ``model.encoders`` maps each of M >= 2 modalities to a module from its input to
            features ``[B, D_m]``; ``model.fuse(features)`` gives logits ``[B, C]``. For instance
            `mmbal_fast.nn.MultiHeadLateFusion`.
        train_loader: batches ``(inputs by modality, labels [B])``, anew each time; moved to the
            model's device.
        val_loader: the same, of samples that were not trained on.
        epochs: how long to train each encoder alone: as long as the model was trained so far.
        optimizer: makes the optimizer of the parameters it gets: as the model's was made.
        fresh: a new encoder for a modality. Default: a copy with ``reset_parameters()`` called on
            all its modules; give it for pretrained encoders, which that would reset, too.
        seed: of the fresh weights, of loaders that draw from torch's generator, and of what is
            shuffled.
        progress: show a progress bar on standard error, needs ``rich``. Default: if it is
            installed and standard error is a terminal.

    Returns:
        The measurements; ``print`` shows a table and one sentence of advice.

    Raises:
        TypeError: a model, loader or batch of another kind.
        ValueError: fewer than two encoders, ``epochs`` below 1, an empty loader, features that are
            not ``[B, D]`` or not finite, labels that do not fit the logits, or an encoder that
            cannot be made fresh.
        ModuleNotFoundError: ``progress=True`` without ``rich``.

    Example:
        >>> import torch
        >>> from mmbal_fast import diagnose
        >>> from mmbal_fast.nn import MultiHeadLateFusion
        >>> _ = torch.manual_seed(0)
        >>> target = torch.arange(200) % 2
        >>> x = {name: target[:, None] + 0.3 * torch.randn(200, 4) for name in ("audio", "image")}
        >>> encoders = {name: torch.nn.Linear(4, 3) for name in x}
        >>> model = MultiHeadLateFusion(encoders, {"audio": 3, "image": 3}, num_classes=2)
        >>> sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
        >>> found = diagnose(model, [(x, target)], [(x, target)], epochs=5, optimizer=sgd)
        >>> found.names, tuple(found.gap.shape), round(found.share.sum().item(), 6)
        (('audio', 'image'), (2,), 1.0)
    """
    op = "diagnose"
    _task.check_model(op, model)
    names = tuple(model.encoders)
    if epochs < 1:
        raise ValueError(f"{op}: epochs must be at least 1 (got {epochs})")
    for which, loader in (("train_loader", train_loader), ("val_loader", val_loader)):
        _task.check_loader(op, which, loader, names)
    device = _task.device_of(model)
    cuda = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        for each in (model, *model.encoders.values()):  # in a plain mapping they are no submodules
            stack.enter_context(evaluating(each))
        torch.manual_seed(seed)
        inputs, _ = _task.to(next(iter(train_loader)), device)
        features = _features(op, _task.encode(model, inputs))
        classes = model.fuse(features).shape[-1]
        alone = {}
        for name, encoder in model.encoders.items():
            encoder = _fresh(op, name, encoder) if fresh is None else fresh(name)
            head = nn.Linear(features[name].shape[1], classes)
            alone[name] = nn.Sequential(encoder, head).to(device)
        optimizers = {name: optimizer(each.parameters()) for name, each in alone.items()}
        steps = [name for name in names for _ in range(epochs)]
        for name in _progress.shown(steps, "each encoder alone", progress):
            _train(alone[name], optimizers[name], name, train_loader, device)
        pairs = {name: (encoder, alone[name].eval()[0]) for name, encoder in model.encoders.items()}
        train, target = _encoded(op, pairs, train_loader, device)
        validation, expected = _encoded(op, pairs, val_loader, device)
        for which, labels in (("train_loader", target), ("val_loader", expected)):
            if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise ValueError(
                    f"{op}: {which} must give labels from 0 to {classes - 1}, one for each logit "
                    f"(got {int(labels.min())} to {int(labels.max())})"
                )
        right = torch.stack(
            [
                probe(train[name][which], target, validation[name][which], expected, classes)
                for name in names
                for which in (0, 1)
            ]
        ).view(len(names), 2, len(expected))
        gap = 100 * (right[:, 1] - right[:, 0])
        fused = _Fused(
            model,
            {name: each[0] for name, each in train.items()},
            {name: each[0] for name, each in validation.items()},
            expected,
        )
        return Diagnosis(
            names=names,
            epochs=epochs,
            samples=len(expected),
            fused=fused.accuracy(fused.features),
            probe=100 * right[:, 0].mean(dim=1).cpu(),
            alone=100 * right[:, 1].mean(dim=1).cpu(),
            gap=gap.mean(dim=1).cpu(),
            gap_error=(gap.std(dim=1) / math.sqrt(len(expected))).cpu(),
            share=fused.share(),
            muted=fused.each(fused.muted),
            shuffled=fused.each(fused.shuffled),
            typicality=fused.typicality(target, classes),
        )


class _Fused:
    """The fusion of a model, on features of its encoders."""

    def __init__(
        self,
        model: FusionModel,
        train: dict[str, Tensor],
        features: dict[str, Tensor],
        target: Tensor,
    ) -> None:
        self.model = model
        self.train = train
        self.features = features
        self.target = target

    def muted(self, name: str) -> dict[str, Tensor]:
        each = self.features[name]
        return self.features | {name: self.train[name].mean(dim=0).expand_as(each)}

    def shuffled(self, name: str) -> dict[str, Tensor]:
        each = self.features[name]
        return self.features | {name: each[torch.randperm(len(each)).to(each.device)]}

    def logits(self, features: dict[str, Tensor]) -> Tensor:
        pieces = [torch.split(each, 1024) for each in features.values()]
        batches = zip(*pieces, strict=True)
        return torch.cat(
            [self.model.fuse(dict(zip(features, each, strict=True))).double() for each in batches]
        )

    def accuracy(self, features: dict[str, Tensor]) -> float:
        right = self.logits(features).argmax(dim=1) == self.target
        return 100 * right.double().mean().item()

    def each(self, changed: Callable[[str], dict[str, Tensor]]) -> Tensor:
        """Accuracy with one modality changed."""
        values = [self.accuracy(changed(name)) for name in self.features]
        return torch.tensor(values, dtype=torch.float64)

    def share(self) -> Tensor:
        whole = self.logits(self.features)
        moves = torch.stack([whole - self.logits(self.muted(name)) for name in self.features])
        centred = moves - moves.mean(dim=2, keepdim=True)
        sizes: Tensor = torch.linalg.vector_norm(centred, dim=2).mean(dim=1)
        return (sizes / sizes.sum()).cpu()

    def typicality(self, target: Tensor, classes: int) -> Tensor:
        widths = {name: each.shape[1] for name, each in self.train.items()}
        gate = TypicalityGate(widths, classes).to(target.device)
        try:
            gate.fit([(self.train, target)], [self.train], progress=False)
        except ValueError:
            return torch.full((len(widths),), math.nan, dtype=torch.float64)
        mean: Tensor = gate.typicality(self.features).double().mean(dim=0)
        return mean.cpu()


def _features(op: str, features: dict[str, Tensor]) -> dict[str, Tensor]:
    _task.check_features(op, features)
    for name, each in features.items():
        if not bool(each.isfinite().all()):
            raise ValueError(f"{op}: features of {name!r} must be finite (got NaN or inf)")
    return features


def _encoded(
    op: str, pairs: dict[str, tuple[nn.Module, nn.Module]], loader: Loader, device: torch.device
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Features of both encoders of each modality, in one pass, and the labels."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in pairs}
    targets = []
    for batch in loader:
        inputs, target = _task.to(batch, device)
        targets.append(target)
        for name, (encoder, alone) in pairs.items():
            both = encoder(inputs[name]), alone(inputs[name])
            for each in both:
                _features(op, {name: each})
            parts[name].append(both)
    features = {}
    for name, each in parts.items():
        first, second = zip(*each, strict=True)
        features[name] = torch.cat(first), torch.cat(second)
    return features, torch.cat(targets).long()


@torch.enable_grad()
def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    name: str,
    loader: Loader,
    device: torch.device,
) -> None:
    """An epoch of one encoder with its head."""
    model.train()
    for batch in loader:
        inputs, target = _task.to(batch, device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[name]), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _fresh(op: str, name: str, encoder: nn.Module) -> nn.Module:
    """A copy with new weights."""
    twin = copy.deepcopy(encoder)
    for path, module in twin.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"{op}: fresh must be given if a module with parameters has no reset_parameters "
                f"(got {type(module).__name__} at {'.'.join(filter(None, (name, path)))!r})"
            )
    return twin
