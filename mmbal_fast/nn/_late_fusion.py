"""What each modality of a late-fusion model predicts on its own."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def unimodal_logits(
    features: Mapping[str, Tensor],
    head: nn.Linear | nn.ModuleDict | Mapping[str, nn.Module],
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
            ``nn.ModuleDict`` with one layer, of any kind, for each name in ``features``. A subclass
            of ``nn.Linear`` with a forward of its own (a cosine head, a quantized or adapted layer)
            has no columns that add up to its logits: see `masked_logits`.
        fusion: how the model joins the features, default ``"concat"``. For any other fusion
            (gated, FiLM, attention) see `masked_logits`.

    Returns:
        ``[B, C]`` (or ``[..., C]``: classes come last, as ``nn.Linear`` has them) for each
        modality, in the order of ``features``. Where classes are looked for in dimension 1, as in
        ``torch.nn.functional.cross_entropy``, token logits ``[B, T, C]`` need ``class_dim=-1``.

    Raises:
        ValueError: ``features`` is empty or differs in more than the last dimension, ``fusion`` is
            unknown, widths do not fit the head, or ``head`` lacks a modality.
        TypeError: ``features`` is no mapping of tensors, ``head`` is no plain ``nn.Linear``, or
            ``fusion="concat"`` with more than one head.

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
    op = "unimodal_logits"
    _check_features(op, features)
    if fusion not in ("concat", "sum"):
        raise ValueError(f"{op}: fusion must be 'concat' or 'sum' (got {fusion!r})")
    for name, each in features.items():
        if each.ndim == 0:
            raise ValueError(f"{op}: features must be [..., D] (got [] for {name!r})")
    if len({each.shape[:-1] for each in features.values()}) > 1:
        shapes = ", ".join(str(list(each.shape)) for each in features.values())
        raise ValueError(
            f"{op}: features must have equal sizes in all but the last dimension (got {shapes})"
        )
    widths = [each.shape[-1] for each in features.values()]

    if fusion == "sum" and isinstance(head, Mapping | nn.ModuleDict):
        if missing := [name for name in features if name not in head]:
            raise ValueError(
                f"{op}: head must have a layer for every name (got none for {missing})"
            )
        return {name: _as_parameters(head[name], each) for name, each in features.items()}
    if not (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        # A graph being compiled does not see what an instance was given.
        and (torch.compiler.is_compiling() or "forward" not in vars(head))
    ):
        raise TypeError(
            f"{op}: fusion={fusion!r} takes one plain nn.Linear as head, for any other see "
            f"masked_logits (got {_type_of(head)})"
        )

    share = None if head.bias is None else head.bias / len(features)
    if fusion == "sum":
        if any(width != head.in_features for width in widths):
            raise ValueError(
                f"{op}: fusion='sum' with one head takes features of its width "
                f"{head.in_features} (got {widths})"
            )
        return {name: _linear(each, head.weight, share) for name, each in features.items()}

    if sum(widths) != head.in_features:
        raise ValueError(
            f"{op}: fusion='concat' (for others see masked_logits) takes features whose widths add "
            f"up to the head's in_features {head.in_features} (got {widths}, sum {sum(widths)})"
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
        forward: from one dict of features by name to logits ``[B, C]`` or ``[B, C, ...]``. Wrap
            a module that takes them otherwise: ``lambda x: fusion(x["audio"], x["image"])``.
        features: a tensor for each modality, of any shape.

    Returns:
        What ``forward`` returns for each modality alone, in the order of ``features``, without
        autograd graph.

    Raises:
        ValueError: ``features`` is empty.
        TypeError: ``features`` is no mapping of tensors, ``forward`` takes no dict, or returns
            something else than a tensor.

    Example:
        >>> import torch
        >>> from mmbal_fast.nn import masked_logits
        >>> def gated(x):
        ...     return x["audio"] * torch.sigmoid(x["image"])
        >>> masked_logits(gated, {"audio": torch.ones(1, 2), "image": torch.ones(1, 2)})
        {'audio': tensor([[0.5000, 0.5000]]), 'image': tensor([[0., 0.]])}
    """
    _check_features("masked_logits", features)
    zeros = {name: torch.zeros_like(each) for name, each in features.items()}
    logits: dict[str, Tensor] = {}
    with evaluating(forward):
        for name, each in features.items():
            logits[name] = _call("masked_logits", forward, {**zeros, name: each})
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
        forward: from one dict of features by name to logits ``[B, C]`` or ``[B, C, ...]``.
        features: a tensor for each modality, of any shape.

    Returns:
        The share of each modality, in the order of ``features``, without autograd graph.

    Raises:
        ValueError: ``features`` is empty.
        TypeError: ``features`` is no mapping of tensors, ``forward`` takes no dict, or returns
            something else than a tensor.

    Example:
        >>> import torch
        >>> from mmbal_fast.nn import shapley_logits
        >>> def product(x):
        ...     return x["audio"] * x["image"] + x["audio"]
        >>> shapley_logits(product, {"audio": torch.full((1, 1), 2.0), "image": torch.ones(1, 1)})
        {'audio': tensor([[3.]]), 'image': tensor([[1.]])}
    """
    _check_features("shapley_logits", features)
    names = list(features)
    zeros = {name: torch.zeros_like(each) for name, each in features.items()}
    shares: dict[str, Tensor] = {}
    with evaluating(forward):
        for size in range(1, len(names) + 1):
            # F(S) enters positively for the members of S, negatively for the others.
            inside = 1.0 / (size * math.comb(len(names), size))
            outside = inside * size / (len(names) - size) if size < len(names) else 0.0
            for joined in itertools.combinations(names, size):
                given = {**zeros, **{name: features[name] for name in joined}}
                out = _call("shapley_logits", forward, given)
                for name in names:
                    term = out * (inside if name in joined else -outside)
                    shares[name] = shares[name] + term if name in shares else term
    return {name: shares[name] for name in names}


def _check_features(op: str, features: object) -> None:
    if not isinstance(features, Mapping):
        raise TypeError(
            f"{op}: features must be a mapping from modalities to tensors "
            f"(got {type(features).__name__})"
        )
    if not features:
        raise ValueError(f"{op}: features must name at least one modality (got none)")
    for name, each in features.items():
        if not isinstance(each, Tensor):
            raise TypeError(
                f"{op}: features must be tensors (got {type(each).__name__} for {name!r})"
            )


def _type_of(value: object) -> str:
    kind = value if isinstance(value, type) else type(value)
    where = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{where}{kind.__qualname__}"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Outside of the autocast block features may be narrower than the head.
    return linear(x.to(weight.dtype), weight, bias)


def _as_parameters(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    parameters = layer.parameters() if isinstance(layer, nn.Module) else iter(())
    first = next(parameters, None)
    return layer(x if first is None else x.to(first.dtype))


def _call(
    op: str, forward: Callable[[dict[str, Tensor]], Any], features: dict[str, Tensor]
) -> Tensor:
    """Calls it, and says what to pass instead if it turns out to take no dict."""
    try:
        inspect.signature(getattr(forward, "forward", forward)).bind(features)
    except TypeError as error:
        raise _takes_no_dict(op, forward, features, error) from None
    except ValueError:  # a builtin without signature
        pass
    try:
        out = forward(features)
    except (AttributeError, KeyError, TypeError) as error:
        # What comes of a dict where a tensor or a sequence is expected; other errors are not ours.
        if isinstance(error, KeyError):
            misused = error.args[0] not in features
        else:
            misused = re.search(r"\b(dict|str)\b", str(error)) is not None
        if not misused:
            raise
        raise _takes_no_dict(op, forward, features, error) from error
    if not isinstance(out, Tensor):
        raise TypeError(f"{op}: forward must return a tensor (got {type(out).__name__})")
    return out


def _takes_no_dict(
    op: str, forward: object, features: Mapping[str, Tensor], error: Exception
) -> TypeError:
    arguments = ", ".join(f"x[{name!r}]" for name in features)
    return TypeError(
        f"{op}: forward must take one dict of features by name, as "
        f"lambda x: fusion({arguments}) does (got {_type_of(_owner(forward))}: "
        f"{type(error).__name__}: {error})"
    )


def _owner(forward: object) -> object:
    return getattr(forward, "__self__", forward)


@contextmanager
def evaluating(forward: object) -> Iterator[None]:
    owner = _owner(forward)
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
