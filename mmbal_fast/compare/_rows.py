"""The rows of the table: a way to train, a way to predict, and what that takes.

To add a row: a line in `ROWS`. A way to train that is new goes to `_trainings`, a way to predict to
`_predictions`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    key: str
    """Its name on the command line."""
    label: str
    training: str
    """A key of `_trainings.TRAININGS`."""
    prediction: str = "fused"
    """A key of `_predictions.PREDICTIONS`, or "alone" for a line per modality."""
    uses: str = ""
    """What it needs beyond the training samples, in a few words; empty if nothing.

    Every row uses labelled validation samples to choose its learning rate.
    """

    @property
    def way(self) -> str:
        """The key of `_predictions.PREDICTIONS` that it asks of a run."""
        return "fused" if self.prediction == "alone" else self.prediction


UNLABELLED = "unlabelled validation inputs"
PRIOR = "prior: the modality that is slowest to learn is the one to trust"

ROWS = {
    row.key: row
    for row in (
        Row("alone", "alone", "independent", "alone"),
        Row("joint", "joint", "joint"),
        Row("independent", "independent encoders, fused head", "independent"),
        Row("independent-mean", "independent, mean of heads", "independent", "mean"),
        Row("independent-product", "independent, product of heads", "independent", "product"),
        Row("ogm", "OGM", "ogm"),
        Row("ogm-ge", "OGM-GE", "ogm-ge"),
        Row("agm", "AGM", "agm"),
        Row("mlb", "MLB, fused head", "mlb"),
        Row("mlb-product", "MLB, product of heads", "mlb", "product"),
        Row("metric", "metric modulation (CGGM)", "metric"),
        Row("info-reg", "InfoReg, fused head", "info-reg"),
        Row("info-reg-product", "InfoReg, product of heads", "info-reg", "product"),
        Row("mmpareto", "MMPareto, fused head", "mmpareto"),
        Row("mmpareto-product", "MMPareto, product of heads", "mmpareto", "product"),
        Row("relearning", "Re-learning", "relearning", uses="validation labels"),
        Row("opm", "OPM", "opm"),
        Row("dgl", "DGL, fused head", "dgl"),
        Row("mmtm", "MMTM on the features", "mmtm"),
        Row("mmtm-greedy", "MMTM, greedy balancing", "mmtm-greedy"),
        Row("blending", "Gradient-Blending, fused head", "blending", uses="validation losses"),
        Row(
            "blending-blend",
            "Gradient-Blending, predict",
            "blending",
            "blend",
            uses="validation losses",
        ),
        Row("unimodal", "unimodal losses, fused head", "unimodal"),
        Row("unimodal-mean", "unimodal losses, mean of heads", "unimodal", "mean"),
        Row("unimodal-product", "unimodal losses, product of heads", "unimodal", "product"),
        Row("pool", "log-linear pool of heads", "unimodal", "pool", "validation labels"),
        Row("gate", "typicality gate, each sample", "unimodal", "gate", UNLABELLED),
        Row(
            "gate16",
            "typicality gate, 16 inputs",
            "unimodal",
            "gate16",
            f"{UNLABELLED}, test inputs in unlabelled batches of 16",
        ),
        Row("shuffle", "ShuffleModality, fused head", "shuffle", uses=PRIOR),
    )
}
