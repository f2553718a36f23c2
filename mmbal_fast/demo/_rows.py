"""What the demo compares: a `Row` for each way to train, and how to add one.

A row names a `Learner`: a model with its optimizer and one training step. A learner that needs
validation data sets ``held_out``: it then gets that many samples less for training. The test set it
never sees.

To add a row: write a `Learner`, add a `Row` to `ROWS`, and if it records curves of its own, add a
panel to `_report.PANELS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

import mmbal_fast
from mmbal_fast import functional
from mmbal_fast.demo import _blended, _greedy
from mmbal_fast.demo._learner import Plain, Row, Setup
from mmbal_fast.nn import unimodal_logits


class Joint(Plain):
    """Plain training on both modalities; records how far they drift apart."""

    def after_backward(self, features: Mapping[str, Tensor], target: Tensor) -> None:
        """Measures what a modulated row would."""
        with torch.no_grad():
            logits = unimodal_logits(features, self.model.head)
        scores = functional.contribution_scores(list(logits.values()), target)
        self.recorder.log("ratio", functional.discrepancy_ratios(scores), self.model.modalities)


class Modulated(Plain):
    """OGM-GE, or without noise OGM."""

    def __init__(self, setup: Setup, noise: float) -> None:
        """As `Plain`, and a balancer."""
        super().__init__(setup)
        self.balancer = mmbal_fast.OGMGE(
            self.model.encoders, alpha=setup.settings.alpha, noise=noise, seed=setup.seed
        )

    def after_backward(self, features: Mapping[str, Tensor], target: Tensor) -> None:
        """The method: scores, ratios, coefficients, gradients."""
        with self.recorder.added(), torch.no_grad():
            record = self.balancer.step(unimodal_logits(features, self.model.head), target)
        names = self.balancer.names
        self.recorder.log("ratio", record.ratios, names)
        self.recorder.log("coefficient", record.coefficients, names)


ROWS = {
    row.key: row
    for row in (
        Row("gray", "gray alone", partial(Plain, modalities=("gray",))),
        Row("color", "colour alone", partial(Plain, modalities=("color",))),
        Row("joint", "joint", Joint),
        Row("ogm", "joint + OGM", partial(Modulated, noise=0.0)),
        Row("ogm-ge", "joint + OGM-GE", partial(Modulated, noise=1.0)),
        Row(
            "blend-offline",
            "Gradient-Blending, offline",
            partial(_blended.Blended, online=False),
            _blended.HELD_OUT,
        ),
        Row(
            "blend-online",
            "Gradient-Blending, online",
            partial(_blended.Blended, online=True),
            _blended.HELD_OUT,
        ),
        Row("mmtm", "MMTM", partial(_greedy.Greedy, balanced=False), _greedy.HELD_OUT),
        Row(
            "mmtm-balanced",
            "MMTM + greedy balancing",
            partial(_greedy.Greedy, balanced=True),
            _greedy.HELD_OUT,
        ),
    )
}
