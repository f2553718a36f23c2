"""Steps of the methods that scale gradients by other rules than OGM-GE's, and OPM's features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmbal_fast import AGM, MLB, OGMGE, OPM, MetricModulation
from mmbal_fast.bench._baselines import (
    published_agm_coefficients,
    published_dropping,
    published_metric_coefficients,
    published_mlb_coefficients,
    published_update_,
)
from mmbal_fast.bench._measure import Provider
from mmbal_fast.bench._workloads import Features, Gradients, Scoring

ALPHA = 0.8
OURS, PUBLISHED, SCALED, DROPOUT = "mmbal_fast", "published", "OGM-GE, no noise", "dropout"
_BATCH = Scoring(modalities=2, batch=64, classes=6)


def modulation(
    method: Callable[..., Any], options: dict[str, float], published: Callable[..., list[float]]
) -> Callable[[Gradients, torch.dtype, torch.device], list[Provider]]:
    """Whole steps of a method, from logits to scaled gradients, beside one of OGM-GE without noise.

    OGM-GE scales by the same coefficients: where one is 1, as by its own rule, nothing is written.

    Args:
        method: the class.
        options: its settings.
        published: coefficients as the released code computes them, from logits, labels and a dict
            for what it remembers.

    Returns:
        From workload, dtype and device the providers, on one set of gradients.
    """

    def providers(workload: Gradients, dtype: torch.dtype, device: torch.device) -> list[Provider]:
        pristine = workload.make(dtype, device)
        parameters = [nn.Parameter(torch.empty_like(each)) for each in pristine]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        grads = [each.grad for each in parameters if each.grad is not None]
        split = len(workload.shapes[0])
        encoders = {"audio": parameters[:split], "visual": parameters[split:]}
        logits, target = _BATCH.make(dtype, device)
        named = {"audio": logits[0], "visual": logits[1]}
        ours = method(encoders, select=lambda name, parameter: True, **options)
        for _ in range(3):  # until what it remembers no longer changes them
            same = ours.step(named, target).coefficients.clone()
        usual = OGMGE(
            encoders,
            alpha=ALPHA,
            rule=lambda ratios: same,
            noise=0.0,
            select=lambda name, parameter: True,
        )
        memory: dict[str, Any] = {}

        def step() -> None:
            published_update_(grads, published(logits, target, memory), workload.modality, False)

        def restore() -> None:
            torch._foreach_copy_(grads, pristine)

        return [
            Provider(OURS, lambda: ours.step(named, target), restore),
            Provider(PUBLISHED, torch.no_grad()(step), restore),
            Provider(SCALED, lambda: usual.step(named, target), restore),
        ]

    return providers


PARTS = {
    "AGM": modulation(AGM, {"alpha": ALPHA}, published_agm_coefficients),
    "MLB": modulation(MLB, {"alpha": ALPHA}, published_mlb_coefficients),
    "metric modulation": modulation(MetricModulation, {}, published_metric_coefficients),
}
"""By the name of the part of a `Case`."""


def dropping(workload: Features, dtype: torch.dtype, device: torch.device) -> list[Provider]:
    """OPM forward and backward, beside dropout of as many features.

    Args:
        workload: sizes of the features.
        dtype: of the features.
        device: where.

    Returns:
        Providers on the same features.
    """
    features = [each.requires_grad_() for each in workload.make(dtype, device)]
    grads = [torch.ones_like(each) for each in features]
    names = [f"modality {m}" for m in range(len(features))]
    named = dict(zip(names, features, strict=True))
    opm = OPM(names, apply=1.0)
    logits, target = Scoring(len(features), workload.batch, 6).make(dtype, device)
    logits[0] = nn.functional.one_hot(target, 6).to(logits[0])
    opm.observe(dict(zip(names, logits, strict=True)), target)

    def backward(results: list[Tensor]) -> None:
        torch.autograd.grad(results, features, grads)

    def dropout() -> None:
        backward([nn.functional.dropout(each, 0.5) for each in features])

    return [
        Provider(OURS, lambda: backward([*opm(named).features.values()])),
        Provider(PUBLISHED, lambda: backward(published_dropping(features, [0.7, 0.0])[0])),
        Provider(DROPOUT, dropout),
    ]
