"""The ways to do each workload, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmbal_fast import OGMGE, _backend, functional
from mmbal_fast.bench._baselines import (
    plain_coefficients,
    plain_update_,
    published_coefficients,
    published_update_,
)
from mmbal_fast.bench._measure import Provider
from mmbal_fast.bench._workloads import Gradients, Scoring

ALPHA = 0.3
BATCH = Scoring(modalities=2, batch=64, classes=6)
"""The logits of a whole step, as in CREMA-D."""

OURS, PUBLISHED, PLAIN, COMPILED, FLOOR = "mmbal_fast", "published", "plain", "compiled", "floor"
FOREACH, GRAPH, USUAL = "foreach_mul", "mmbal_fast graph", "mmbal_fast float32"


def step(
    workload: Gradients, dtype: torch.dtype, device: torch.device, noise: bool, compiled: bool
) -> list[Provider]:
    """A whole step, from logits to modulated gradients; and the floor, two passes over the bytes.

    Args:
        workload: shapes of the gradients.
        dtype: of gradients and logits.
        device: where.
        noise: OGM-GE, or OGM without noise.
        compiled: also torch.compile of the plain step, which takes a minute to compile.

    Returns:
        Providers that share one set of gradients.
    """
    pristine = workload.make(dtype, device)
    grads = [torch.empty_like(grad) for grad in pristine]
    parameters = [nn.Parameter(torch.empty_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    split = len(workload.shapes[0])
    modality = workload.modality
    logits, target = BATCH.make(dtype, device)
    named = {"audio": logits[0], "visual": logits[1]}
    balancer = OGMGE(
        {"audio": parameters[:split], "visual": parameters[split:]},
        alpha=ALPHA,
        noise=float(noise),
        select=lambda name, parameter: True,
    )

    def published() -> None:
        _, coefficients = published_coefficients(logits, target, ALPHA)
        published_update_(grads, coefficients, modality, noise)

    def plain(grads: Sequence[Tensor], logits: Sequence[Tensor], target: Tensor) -> None:
        plain_update_(grads, plain_coefficients(logits, target, ALPHA), modality, noise)

    def floor() -> None:
        if noise:
            for grad in grads:
                grad.sum()
        torch._foreach_mul_(grads, 0.999)

    def restore() -> None:
        torch._foreach_copy_(grads, pristine)

    providers = [
        Provider(OURS, lambda: balancer.step(named, target), restore),
        Provider(PUBLISHED, torch.no_grad()(published), restore),
        Provider(PLAIN, torch.no_grad()(lambda: plain(grads, logits, target)), restore),
        Provider(FLOOR, floor, restore),
    ]
    if not noise:
        providers.append(Provider(FOREACH, lambda: torch._foreach_mul_(grads, 0.999), restore))
    if compiled:
        fused: Callable[..., Any] = torch.compile(plain)
        providers.append(
            Provider(COMPILED, torch.no_grad()(lambda: fused(grads, logits, target)), restore)
        )
    if device.type == "cuda":
        providers.append(Provider(GRAPH, captured(lambda: balancer.step(named, target)), restore))
    return providers


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """``run`` as a CUDA graph, after the warm-up that capture needs."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def scoring(
    workload: Scoring, dtype: torch.dtype, device: torch.device, slow: bool
) -> list[Provider]:
    """Scores of a batch.

    Args:
        workload: sizes of the batch.
        dtype: of the logits.
        device: where.
        slow: also the published loop, which is written for two modalities.

    Returns:
        Providers on the same logits; the floor reads them once.
    """
    logits, target = workload.make(dtype, device)
    label = target.unsqueeze(1)

    def plain() -> Tensor:
        return torch.stack([each.softmax(dim=1).gather(1, label).sum() for each in logits])

    providers = [
        Provider(OURS, lambda: functional.contribution_scores(logits, target)),
        Provider(PLAIN, plain),
        Provider(FLOOR, lambda: [each.sum() for each in logits]),
    ]
    if slow and workload.modalities == 2:
        providers.append(Provider(PUBLISHED, lambda: published_coefficients(logits, target, ALPHA)))
    return providers


def parts(
    workload: Gradients, dtype: torch.dtype, device: torch.device
) -> dict[str, list[Provider]]:
    """The pieces of a step alone: noise into memory, and moments.

    Args:
        workload: shapes of the gradients.
        dtype: of the gradients.
        device: where.

    Returns:
        Providers by piece.
    """
    grads = workload.make(dtype, device)
    # In place on both sides: fresh memory costs more than what is written to it.
    native = _backend.native
    assert native is not None

    def ours_noise() -> None:
        for index, grad in enumerate(grads):
            native.noise_(grad, 0, 0, index, 0, torch.get_num_threads())

    def torch_noise() -> None:
        for grad in grads:
            grad.normal_()

    def reads() -> None:
        for grad in grads:
            grad.sum()

    def writes() -> None:
        for grad in grads:
            grad.fill_(1.0)

    def deviations() -> None:
        for grad in grads:
            grad.std()

    return {
        "noise": [
            Provider(OURS, ours_noise),
            Provider(PLAIN, torch_noise),
            Provider(FLOOR, writes),
        ],
        "moments": [
            Provider(OURS, lambda: functional.gradient_moments(grads)),
            Provider(PLAIN, deviations),
            Provider(FLOOR, reads),
        ],
    }


def copy_bandwidth(device: torch.device, seconds: Callable[[Provider], float]) -> float:
    """Bytes per second that a plain copy moves, reads and writes counted.

    Args:
        device: where.
        seconds: times a provider.

    Returns:
        Bytes per second.
    """
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    spent = seconds(Provider("copy", lambda: target.copy_(source)))
    return 2 * source.numel() * source.element_size() / spent
