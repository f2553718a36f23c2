"""What `mmbal_fast.diagnose` and ``mmbal-fast compare --module`` ask of a model and its data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Mapping[str, Tensor], Tensor]
"""The input of each modality, and int64 ``[B]`` labels from 0 on."""

Loader = Iterable[Batch]
"""Batches, anew each time that it is iterated over: a ``DataLoader``, a list."""


class Loaders(NamedTuple):
    """The data of a task, split."""

    train: Loader
    validation: Loader
    test: Loader


class FusionModel(Protocol):
    """An ``nn.Module`` that says where its encoders end and its fusion begins.

    Its forward is ``fuse({name: encoder(inputs[name]) for name, encoder in encoders.items()})``.
    `mmbal_fast.nn.MultiHeadLateFusion` is one.
    """

    @property
    def encoders(self) -> Mapping[str, nn.Module] | nn.ModuleDict:
        """For each of at least two modalities a module from its input to features ``[B, D_m]``."""
        ...

    def fuse(self, features: Mapping[str, Tensor], /) -> Tensor:
        """Logits ``[B, C]`` from the features of all modalities, in the order of `encoders`."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of ``nn.Module``, like the rest."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """As of ``nn.Module``."""
        ...

    def train(self, mode: bool = True) -> Any:
        """As of ``nn.Module``."""
        ...

    def eval(self) -> Any:
        """As of ``nn.Module``."""
        ...


class Task(Protocol):
    """What a file for ``mmbal-fast compare --module`` defines."""

    def model(self) -> FusionModel:
        """A new model, its weights drawn from torch's generator."""
        ...

    def loaders(self, seed: int) -> Loaders:
        """The data; the seed may decide on the split and on the order of the batches."""
        ...


def encode(model: FusionModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features ``[B, D_m]`` of each modality, in the order of the encoders."""
    return {name: encoder(inputs[name]) for name, encoder in model.encoders.items()}


def device_of(model: FusionModel) -> torch.device:
    """Where its first parameter is; the CPU if it has none."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def to(batch: Batch, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """The batch on a device."""
    inputs, target = batch
    return {name: each.to(device) for name, each in inputs.items()}, target.to(device)


def check_model(op: str, model: object) -> None:
    """Refuses what is no `FusionModel`.

    Raises:
        TypeError: it is no module, or ``encoders`` or ``fuse`` is missing or of another kind.
        ValueError: fewer than two encoders.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module (got {type(model).__name__})")
    encoders = getattr(model, "encoders", None)
    if not isinstance(encoders, Mapping | nn.ModuleDict) or not all(
        isinstance(each, nn.Module) for each in encoders.values()
    ):
        raise TypeError(
            f"{op}: model.encoders must be a mapping from modalities to modules "
            f"(got {'none' if encoders is None else type(encoders).__name__})"
        )
    if len(encoders) < 2:
        raise ValueError(f"{op}: model.encoders must hold at least 2 (got {list(encoders)})")
    if not callable(getattr(model, "fuse", None)):
        raise TypeError(
            f"{op}: model.fuse must be a method from features by name to logits "
            f"(got {type(getattr(model, 'fuse', None)).__name__})"
        )


def check_features(op: str, features: Mapping[str, Tensor]) -> None:
    """Refuses what is no ``[B, D]`` for each modality.

    Raises:
        ValueError: another number of dimensions.
    """
    for name, each in features.items():
        if each.ndim != 2:
            raise ValueError(
                f"{op}: the encoder of {name!r} must give features [B, D] (got {list(each.shape)})"
            )


def check_loader(op: str, name: str, loader: object, modalities: Iterable[str]) -> None:
    """Refuses what is no `Loader` of these modalities, by its first batch.

    Raises:
        TypeError: it can be iterated over only once, or its batches are no `Batch`.
        ValueError: it is empty, a modality is missing, or lengths differ.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
        raise TypeError(
            f"{op}: {name} must give its batches anew each time, as a DataLoader or a list "
            f"(got {type(loader).__name__})"
        )
    first = list(itertools.islice(loader, 1))
    if not first:
        raise ValueError(f"{op}: {name} must hold at least one batch (got none)")
    batch = first[0]
    if (
        not isinstance(batch, tuple | list)
        or len(batch) != 2
        or not isinstance(batch[0], Mapping)
        or not isinstance(batch[1], Tensor)
    ):
        kinds = [type(each).__name__ for each in batch] if isinstance(batch, tuple | list) else None
        raise TypeError(
            f"{op}: {name} must give (inputs by modality, target) "
            f"(got {kinds or type(batch).__name__})"
        )
    inputs, target = batch
    if missing := [each for each in modalities if each not in inputs]:
        raise ValueError(
            f"{op}: {name} must give the inputs of every modality "
            f"(got {list(inputs)}, none for {missing})"
        )
    if target.ndim != 1 or target.dtype != torch.int64:
        raise ValueError(
            f"{op}: {name} must give int64 labels [B] "
            f"(got {target.dtype} of shape {list(target.shape)})"
        )
    if any(len(each) != len(target) for each in inputs.values()):
        raise ValueError(
            f"{op}: {name} must give as many inputs as labels (got "
            f"{ {each: len(value) for each, value in inputs.items()} } and {len(target)})"
        )
