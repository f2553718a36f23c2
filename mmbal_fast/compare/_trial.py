"""One training run: trained once, its weights kept; then predicted from, clean and corrupted."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

import torch
from torch import Tensor

from mmbal_fast._task import Loader, Loaders, Task, check_loader, check_model
from mmbal_fast.compare._corruptions import CORRUPTIONS, scales
from mmbal_fast.compare._data import DATA
from mmbal_fast.compare._network import Network
from mmbal_fast.compare._predictions import PREDICTIONS, Seen, told
from mmbal_fast.compare._trainings import TRAININGS, Outputs, Setup, Training

RATES = {"sgd": (0.01, 0.03), "adamw": (0.001, 0.003)}
"""Learning rates that every row chooses from, by its accuracy on the validation samples; a task may
have its own in ``rates``."""

EPOCHS = 20
"""Of a task that does not say ``epochs``."""


@dataclass(frozen=True)
class Run:
    """What is trained once."""

    data: str
    """A key of `DATA`, or the path of a module that is a `Task`."""
    optimizer: str
    training: str
    rate: float
    seed: int
    epochs: int
    files: str = ""
    """Directory of the wheels that hold data."""

    @property
    def name(self) -> str:
        """Of the files that keep what came of it; another for another text of the module."""
        data = self.data
        if data not in DATA:
            data = f"{Path(data).stem}-{zlib.crc32(Path(data).read_bytes()):08x}"
        return (
            f"{data}-{self.optimizer}-{self.training}-{self.rate:g}-seed{self.seed}-"
            f"{self.epochs}epochs"
        )


def load_task(data: str, files: str) -> Task:
    """A built-in data set by its name, or the module at a path."""
    if data in DATA:
        return DATA[data](Path(files))
    spec = importlib.util.spec_from_file_location(Path(data).stem, data)
    assert spec is not None
    assert spec.loader is not None
    if (directory := str(Path(data).parent)) not in sys.path:
        sys.path.insert(0, directory)  # for what it imports, as if it were run
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not all(callable(getattr(module, name, None)) for name in ("model", "loaders")):
        names = [name for name in vars(module) if not name.startswith("_")]
        raise TypeError(f"compare: {data} must define model and loaders (got {names})")
    return module


def make_optimizer(name: str, network: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW with weight decay 0.01."""
    if name == "sgd":
        return torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, fused=True)
    return torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01, fused=True)


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """One thread, as networks this small gain nothing from more, and torch's generator seeded.

    The caller's generator and thread count come back as they were.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def setting(task: Task, seed: int) -> tuple[Network, Loaders]:
    """The network with its first weights, the same for all rows of a seed, and the data.

    Raises:
        TypeError: as `check_model` and `check_loader`.
        ValueError: likewise, and features that are not ``[B, D]``.
    """
    loaders = Loaders(*task.loaders(seed))
    torch.manual_seed(seed)
    model = task.model()
    check_model("compare", model)
    for name, loader in loaders._asdict().items():
        check_loader("compare", name, loader, model.encoders)
    return Network(model, loaders.train), loaders


def _make(spec: Run) -> Training:
    network, loaders = setting(load_task(spec.data, spec.files), spec.seed)
    optimizer = make_optimizer(spec.optimizer, network, spec.rate)
    return TRAININGS[spec.training](Setup(network, loaders, optimizer, spec.epochs, spec.seed))


def train(spec: Run, path: Path) -> None:
    """Trains, and keeps what came of it in a file."""
    with _alone(spec.seed):
        training = _make(spec)
        training.network.train()
        training.prepare()
        seconds = []
        for _ in range(spec.epochs):
            for inputs, target in training.setup.loaders.train:
                start = thread_time()
                training.step(inputs, target)
                seconds.append(thread_time() - start)
            training.end_epoch()
    state = {"step_ms": 1e3 * median(seconds), **training.state_dict()}
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)  # a run that was cut off leaves no half of a file


@torch.no_grad()
def evaluate(
    spec: Run, path: Path, ways: Sequence[str], *, corrupted: bool = True
) -> dict[str, Any]:
    """Predicts in several ways from what `train` kept.

    Args:
        spec: what was trained.
        path: of the file.
        ways: keys of `PREDICTIONS`.
        corrupted: also measure what is left when a modality is corrupted, the longest part.

    Returns:
        ``step_ms``, CPU time of the median training step; and accuracies in per cent: ``own``, of
        the test set by each modality's own classifier (its head where heads were trained, else its
        share of the fused logits); ``alone``, of the validation set by heads that were trained;
        ``told``, of the test set by all modalities but one; and in ``ways`` for each way
        ``validation``, ``test`` and ``corrupted``, by corruption and modality.
    """
    with _alone(spec.seed):
        training = _make(spec)
        state = torch.load(path)
        training.load_state_dict(state)
        network, loaders = training.network, training.setup.loaders
        network.eval()
        train, train_target = _outputs(training, loaders.train)
        validation, validation_target = _outputs(training, loaders.validation)
        test, target = _outputs(training, loaders.test)
        seen = Seen(training, train, train_target, validation, validation_target)
        predictions = {way: PREDICTIONS[way](seen) for way in ways}
        out: dict[str, Any] = {"step_ms": state["step_ms"], "ways": {}}
        for way, predict in predictions.items():
            out["ways"][way] = {
                "validation": accuracy(predict(validation), validation_target),
                "test": accuracy(predict(test), target),
            }
            if corrupted:
                out["ways"][way]["corrupted"] = {kind: {} for kind in CORRUPTIONS}
        out["own"] = {name: accuracy(each, target) for name, each in training.own(test).items()}
        if training.trains_heads:
            out["alone"] = {
                name: accuracy(each, validation_target)
                for name, each in validation.unimodal.items()
            }
        if not corrupted:
            return out
        scale = scales(loaders.train)
        out["told"] = {}
        for name in network.names:
            out["told"][name] = accuracy(told(training, test, name), target)
            encoder = network.model.encoders[name]
            for kind, corrupt in CORRUPTIONS.items():
                generator = torch.Generator().manual_seed(spec.seed)
                pieces = [
                    encoder(corrupt(inputs[name], scale[name], generator))
                    for inputs, _ in loaders.test
                ]
                outputs = training.outputs({**test.features, name: torch.cat(pieces)})
                for way, predict in predictions.items():
                    out["ways"][way]["corrupted"][kind][name] = accuracy(predict(outputs), target)
    return out


def _outputs(training: Training, loader: Loader) -> tuple[Outputs, Tensor]:
    """What the network says of all samples, and their labels."""
    features: dict[str, list[Tensor]] = {name: [] for name in training.network.names}
    targets = []
    for inputs, target in loader:
        for name, each in training.network.encode(inputs).items():
            features[name].append(each)
        targets.append(target)
    whole = {name: torch.cat(each) for name, each in features.items()}
    return training.outputs(whole), torch.cat(targets)


def accuracy(scores: Tensor, target: Tensor) -> float:
    """In per cent."""
    return 100.0 * (scores.argmax(dim=1) == target).double().mean().item()
