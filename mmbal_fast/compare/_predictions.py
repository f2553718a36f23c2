"""Ways to predict from a trained network. To add one: a function, and a line in `PREDICTIONS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mmbal_fast.compare._trainings import Blended, Outputs, Training
from mmbal_fast.fusion import LogLinearPool, TypicalityGate
from mmbal_fast.fusion.typicality_gate import Mode


class Seen(NamedTuple):
    """What a prediction may be fitted to."""

    training: Training
    train: Outputs
    train_target: Tensor
    validation: Outputs
    validation_target: Tensor


Prediction = Callable[[Outputs], Tensor]
"""Scores ``[N, C]``: the greatest is the predicted class."""


def log_probabilities(outputs: Outputs) -> Tensor:
    """``[M, N, C]``: of the modalities' heads."""
    return torch.stack(list(outputs.unimodal.values())).log_softmax(dim=2)


def _fused(seen: Seen) -> Prediction:
    return lambda outputs: outputs.fused


def _mean(seen: Seen) -> Prediction:
    return lambda outputs: log_probabilities(outputs).exp().mean(dim=0)


def _product(seen: Seen) -> Prediction:
    return lambda outputs: log_probabilities(outputs).sum(dim=0)


def _gate(seen: Seen, batch: int | None) -> Prediction:
    """`TypicalityGate`: soft without a batch size, hard on unlabelled batches of that size."""
    network = seen.training.network
    mode: Mode = "soft" if batch is None else "hard"
    gate = TypicalityGate(network.widths, network.classes, mode=mode)
    gate.fit([(seen.train.features, seen.train_target)], [seen.validation.features], progress=False)

    def predict(outputs: Outputs) -> Tensor:
        pieces = [
            gate(
                {name: each[rows] for name, each in outputs.features.items()},
                {name: each[rows] for name, each in outputs.unimodal.items()},
            )
            for rows in torch.split(torch.arange(len(outputs.fused)), batch or len(outputs.fused))
        ]
        return torch.cat(pieces)

    return predict


def _pool(seen: Seen) -> Prediction:
    """`LogLinearPool` of the heads, fitted on the validation labels."""
    pool = LogLinearPool(seen.training.network.names)
    pool.fit(seen.validation.unimodal, seen.validation_target)
    return lambda outputs: pool(outputs.unimodal)


def _blend(seen: Seen) -> Prediction:
    """`GradientBlending.predict`: the weights of the losses, for the heads' predictions too."""
    assert isinstance(seen.training, Blended)
    blending = seen.training.blending
    return lambda outputs: blending.predict({**outputs.unimodal, "fused": outputs.fused})


PREDICTIONS: dict[str, Callable[[Seen], Prediction]] = {
    "fused": _fused,
    "mean": _mean,
    "product": _product,
    "gate": partial(_gate, batch=None),
    "gate16": partial(_gate, batch=16),
    "pool": _pool,
    "blend": _blend,
}
"""By their name in `_rows`. All but "fused" need heads that were trained."""


def told(training: Training, outputs: Outputs, without: str) -> Tensor:
    """Scores ``[N, C]`` for who knows that a modality is not to be trusted: the others decide.

    The product of their heads' probabilities where heads were trained, else the fusion of their
    features and zeros.
    """
    if training.trains_heads:
        others = {name: each for name, each in outputs.unimodal.items() if name != without}
        return log_probabilities(replace(outputs, unimodal=others)).sum(dim=0)
    muted = torch.zeros_like(outputs.features[without])
    return training.outputs({**outputs.features, without: muted}).fused
