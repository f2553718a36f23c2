"""What each modality of a late-fusion model predicts on its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def unimodal_logits(
    features: Mapping[str, Tensor],
    head: nn.Linear | nn.ModuleDict | Mapping[str, nn.Linear],
    *,
    fusion: Literal["concat", "sum"] = "concat",
) -> dict[str, Tensor]:
    """Split the logits of a linear late-fusion head into the share of each modality.

    Peng et al., "Balanced Multimodal Learning via On-the-fly Gradient Modulation" (CVPR 2022),
    section 3.2: with M modalities and features ``x_m``,

    - ``fusion="concat"``, one head over ``cat(x_0, x_1, ...)``: ``x_m W_m^T + b / M``, where
      ``W_m`` are the columns of the head's weight that meet ``x_m``;
    - ``fusion="sum"``, one head for each modality: ``x_m W_m^T + b_m``;
    - ``fusion="sum"``, one head over ``x_0 + x_1 + ...``: ``x_m W^T + b / M``.

    In each case the shares add up to the fused logits. Features of another type, as autocast makes
    them, are converted to the head's. Gradients flow through them to the features
    and the head, for use in a loss; `mmbal_fast.OGMGE` detaches what it is given.

    Args:
        features: ``[B, D_m]`` (or ``[..., D_m]``) for each modality. For concatenation the order
            of the mapping must be the order in which the model concatenates; widths may differ.
        head: the model's last layer: one ``nn.Linear``, or for ``fusion="sum"`` also a mapping or
            ``nn.ModuleDict`` with one linear layer for each name in ``features``.
        fusion: how the model joins the features, default ``"concat"``. For any other fusion see
            `masked_logits`.

    Returns:
        ``[B, C]`` (or ``[..., C]``) for each modality, in the order of ``features``.

    Raises:
        ValueError: ``features`` is empty, ``fusion`` is unknown, widths do not fit the head, or
            ``head`` lacks a modality.
        TypeError: ``features`` is no mapping, or ``fusion="concat"`` with more than one head.

    Example:
        >>> import torch
        >>> from mmbal_fast.nn import unimodal_logits
        >>> head = torch.nn.Linear(5, 3)
        >>> features = {"audio": torch.randn(4, 2), "image": torch.randn(4, 3)}
        >>> logits = unimodal_logits(features, head)
        >>> fused = head(torch.cat([features["audio"], features["image"]], dim=1))
        >>> torch.allclose(logits["audio"] + logits["image"], fused, atol=1e-6)
        True
    """
    _require_mapping("unimodal_logits", features)
    if not features:
        raise ValueError("unimodal_logits: features must name at least one modality (got none)")
    if fusion not in ("concat", "sum"):
        raise ValueError(f"unimodal_logits: fusion must be 'concat' or 'sum' (got {fusion!r})")
    widths = [each.shape[-1] for each in features.values()]

    if not isinstance(head, nn.Linear):
        if fusion == "concat":
            raise TypeError(
                "unimodal_logits: fusion='concat' takes one nn.Linear as head "
                f"(got {type(head).__name__})"
            )
        if missing := [name for name in features if name not in head]:
            raise ValueError(
                f"unimodal_logits: head must have a layer for every name (got none for {missing})"
            )
        return {
            name: head[name](each.to(head[name].weight.dtype))  # type: ignore[arg-type]
            for name, each in features.items()
        }

    share = None if head.bias is None else head.bias / len(features)
    if fusion == "sum":
        if any(width != head.in_features for width in widths):
            raise ValueError(
                "unimodal_logits: fusion='sum' with one head takes features of its width "
                f"{head.in_features} (got {widths})"
            )
        return {name: _linear(each, head.weight, share) for name, each in features.items()}

    if sum(widths) != head.in_features:
        raise ValueError(
            "unimodal_logits: widths of the features must add up to the head's in_features "
            f"{head.in_features} (got {widths}, sum {sum(widths)})"
        )
    columns = torch.split(head.weight, widths, dim=1)
    return {
        name: _linear(each, weight, share)
        for (name, each), weight in zip(features.items(), columns, strict=True)
    }


@torch.no_grad()
def masked_logits(
    forward: Callable[[dict[str, Tensor]], Tensor], features: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a model predicts when it sees one modality and zeros for the others.

    For fusion that no linear head can split (gated, FiLM, attention): the advice of the authors of
    OGM-GE (CVPR 2022). Costs one forward pass of the fusion for each modality.

    If ``forward`` is an ``nn.Module`` or a method of one, it runs in evaluation mode, and every
    submodule then gets its own mode back: dropout is off and draws nothing from torch's
    generators, and batch norm uses its running statistics and leaves them as they are. With any
    other callable (a lambda, say) this is up to the caller.

    Args:
        forward: from features by name to logits ``[B, C]`` or ``[B, C, ...]``.
        features: a tensor for each modality, of any shape.

    Returns:
        What ``forward`` returns for each modality alone, in the order of ``features``, without
        autograd graph.

    Raises:
        ValueError: ``features`` is empty.
        TypeError: ``features`` is no mapping, or ``forward`` returns something else than a tensor.

    Example:
        >>> import torch
        >>> from mmbal_fast.nn import masked_logits
        >>> def gated(x):
        ...     return x["audio"] * torch.sigmoid(x["image"])
        >>> masked_logits(gated, {"audio": torch.ones(1, 2), "image": torch.ones(1, 2)})
        {'audio': tensor([[0.5000, 0.5000]]), 'image': tensor([[0., 0.]])}
    """
    _require_mapping("masked_logits", features)
    if not features:
        raise ValueError("masked_logits: features must name at least one modality (got none)")
    zeros = {name: torch.zeros_like(each) for name, each in features.items()}
    logits: dict[str, Tensor] = {}
    with evaluating(forward):
        for name, each in features.items():
            logits[name] = _require_tensor("masked_logits", forward({**zeros, name: each}))
    return logits


@torch.no_grad()
def shapley_logits(
    forward: Callable[[dict[str, Tensor]], Tensor], features: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Each modality's share of a model's logits: its mean contribution over all orders of joining.

    ``m_i = sum over S without i of |S|! (M - |S| - 1)! / M! (F(S + i) - F(S))``, where ``F(S)``
    are the logits with the features of S and zeros for the others, and ``F`` of none is left out:
    so the shares add up to the model's logits. For two modalities
    ``m_a = (F(a, v) - F(0, v) + F(a, 0)) / 2``: Li et al., "Boosting Multi-modal Model Performance
    with Adaptive Gradient Modulation" (ICCV 2023). For a linear head over concatenated
    or summed features they are what `unimodal_logits` gives without a forward pass.

    Costs ``2^M - 1`` forward passes: 3 for two modalities, 7 for three, 15 for four. If ``forward``
    is an ``nn.Module`` or a method of one, it runs in evaluation mode, as in `masked_logits`.

    Args:
        forward: from features by name to logits ``[B, C]`` or ``[B, C, ...]``.
        features: a tensor for each modality, of any shape.

    Returns:
        The share of each modality, in the order of ``features``, without autograd graph.

    Raises:
        ValueError: ``features`` is empty.
        TypeError: ``features`` is no mapping, or ``forward`` returns something else than a tensor.

    Example:
        >>> import torch
        >>> from mmbal_fast.nn import shapley_logits
        >>> def product(x):
        ...     return x["audio"] * x["image"] + x["audio"]
        >>> shapley_logits(product, {"audio": torch.full((1, 1), 2.0), "image": torch.ones(1, 1)})
        {'audio': tensor([[3.]]), 'image': tensor([[1.]])}
    """
    _require_mapping("shapley_logits", features)
    names = list(features)
    if not names:
        raise ValueError("shapley_logits: features must name at least one modality (got none)")
    zeros = {name: torch.zeros_like(each) for name, each in features.items()}
    shares: dict[str, Tensor] = {}
    with evaluating(forward):
        for size in range(1, len(names) + 1):
            # F(S) enters positively for the members of S, negatively for the others.
            inside = 1.0 / (size * math.comb(len(names), size))
            outside = inside * size / (len(names) - size) if size < len(names) else 0.0
            for joined in itertools.combinations(names, size):
                given = {**zeros, **{name: features[name] for name in joined}}
                out = _require_tensor("shapley_logits", forward(given))
                for name in names:
                    term = out * (inside if name in joined else -outside)
                    shares[name] = shares[name] + term if name in shares else term
    return {name: shares[name] for name in names}


def _require_mapping(op: str, features: object) -> None:
    if not isinstance(features, Mapping):
        raise TypeError(
            f"{op}: features must be a mapping from modalities to tensors "
            f"(got {type(features).__name__})"
        )


def _require_tensor(op: str, out: object) -> Tensor:
    if not isinstance(out, Tensor):
        raise TypeError(f"{op}: forward must return a tensor (got {type(out).__name__})")
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Outside of the autocast block features may be narrower than the head.
    return linear(x.to(weight.dtype), weight, bias)


@contextmanager
def evaluating(forward: object) -> Iterator[None]:
    owner = getattr(forward, "__self__", forward)
    modules = list(owner.modules()) if isinstance(owner, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        # Flags, not eval(): a module may do more in train(), and its parts may differ in mode.
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
