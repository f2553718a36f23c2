"""Features of a modality that dominates, dropped for some samples before the fusion."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmbal_fast import _backend, reference
from mmbal_fast.functional import _checks
from mmbal_fast.functional._logits import plain
from mmbal_fast.functional._operation import Operation
from mmbal_fast.reference._dropping import scaled_rows
from mmbal_fast.reference._noise import is_dense

Results = tuple[list[Tensor], Tensor, Tensor, Tensor]


def drop_features(
    features: Sequence[Tensor],
    ratios: Tensor,
    *,
    base: float | Tensor,
    strength: float | Tensor,
    apply: float | Tensor = 1.0,
    seed: int = 0,
    step: int | Tensor = 0,
    stream: int = 1,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Drops features of the modalities that dominate, for whole samples, and scales the rest.

    On-the-fly prediction modulation of Wei, Hu, Du, Wen, "On-the-fly Modulation for Balanced
    Multimodal Learning" (TPAMI 2024)::

        q_m   = clamp(base (1 + strength tanh(rho_m - 1)), 0, 1)   where rho_m > 1, else 0
        x_m   <- x_m keep_m / (1 - theta),   keep_m[i] ~ Bernoulli(1 - q_m)
        theta = sum_m d_m q_m / sum_m d_m

    with ``d_m`` the number of features of modality m. One launch forward and one backward for all
    modalities; nothing is read back to the host. The draws are Philox's, a function of seed, step,
    stream and sample, and no generator of torch is read or advanced. A dropped row is 0 and so is
    its gradient, whatever it holds.

    Args:
        features: M tensors ``[B, ...]``: float64, float32, float16 or bfloat16, on one device. One
            whose samples are no blocks of memory is copied.
        ratios: float32 ``[M]`` on that device, as `discrepancy_ratios` gives them. A constant; NaN
            drops nothing.
        base: probability for a modality that barely dominates, 0 to 1.
        strength: how much it grows with the ratio, from 0 on.
        apply: probability that anything is dropped, 0 to 1, default 1; one draw for the batch.
        seed: 64-bit seed of the draws, default 0.
        step: step number, an int or an int64 tensor of one element on the device of the features;
            its low 32 bits count.
        stream: 32-bit id of the first modality's draws, from 1 on, default 1; the others follow. On
            several ranks give each its own.

    Returns:
        The features to fuse; the weight of each sample, ``[B]`` in the type of the first features,
        0 if it lost every modality, else 1; and the probabilities ``q``, float32 ``[M]``.

    Raises:
        ValueError: no features, batches or devices that do not fit together, a number out of range.
        TypeError: features or ratios of another type.

    Example:
        >>> import torch
        >>> from mmbal_fast import functional
        >>> ones = [torch.ones(1, 2), torch.ones(1, 2)]
        >>> ratios = torch.tensor([9.0, 0.1])
        >>> features, weight, q = functional.drop_features(ones, ratios, base=1.0, strength=0.5)
        >>> features  # the first is dropped for sure, the second scaled by 2
        [tensor([[0., 0.]]), tensor([[2., 2.]])]
        >>> weight
        tensor([1.])
    """
    op = "drop_features"
    _checks.sequence(op, "features", features)
    if len(features) == 0:
        raise ValueError(f"{op}: features must hold at least one tensor (got none)")
    _checks.features(op, features)
    first = features[0]
    if _checks.dense(op, "ratios", ratios).dtype != torch.float32:
        raise TypeError(f"{op}: ratios must be a float32 tensor (got {ratios.dtype})")
    if ratios.shape != (len(features),) or ratios.device != first.device:
        raise ValueError(
            f"{op}: ratios must be [{len(features)}] on the device of the features "
            f"(got {list(ratios.shape)} on {ratios.device})"
        )
    _checks.step(op, step, first.device)
    results, weight, q, _ = drop(
        features,
        ratios,
        probability(op, "base", base),
        _checks.setting(op, "strength", strength),
        probability(op, "apply", apply),
        _checks.word64(op, "seed", seed),
        step,
        _checks.integer(op, "stream", stream, 1, 2**32 - 1 - len(features)),
    )
    return results, weight, q


def probability(op: str, name: str, value: float | Tensor) -> float | Tensor:
    """A `_checks.setting` from 0 to 1."""
    value = _checks.setting(op, name, value)
    if not isinstance(value, Tensor) and value > 1:
        raise ValueError(f"{op}: {name} must be from 0 to 1 (got {value})")
    return value


def drop(
    features: Sequence[Tensor],
    ratios: Tensor,
    base: float | Tensor,
    strength: float | Tensor,
    apply: float | Tensor,
    seed: int,
    step: int | Tensor,
    stream: int,
    *,
    advance: bool = False,
) -> Results:
    """`drop_features` on checked arguments, with what rows were multiplied by, float32 ``[M, B]``.

    With ``advance`` the tensor ``step`` grows by 1 at the end; for eager calls only, as an
    operation of a graph that has a gradient must write nothing.
    """
    number, counter = (0, step) if isinstance(step, Tensor) else (step, None)
    return _forward(features, ratios, base, strength, apply, seed, number, counter, stream, advance)


def _number(name: str, value: float | Tensor) -> float:
    return _checks.number("drop_features", name, value)


def _by_rows(features: Tensor) -> Tensor:
    """With each sample a block of memory."""
    features = plain(features).resolve_neg()
    rows = features.is_contiguous() or (
        is_dense(features)
        and features.shape[0] > 1
        and features.stride(0) == features.shape[1:].numel()
    )
    return features if rows else features.contiguous()


def _fake(features: Sequence[Tensor], *_: object) -> Results:
    return _empty([_by_rows(each) for each in features])


def _empty(features: Sequence[Tensor]) -> Results:
    count, batch = len(features), features[0].shape[0]
    return (
        [torch.empty_like(each) for each in features],
        features[0].new_empty(batch),
        features[0].new_empty(count, dtype=torch.float32),
        features[0].new_empty(count, batch, dtype=torch.float32),
    )


def _native(
    native: ModuleType,
    features: Sequence[Tensor],
    ratios: Tensor,
    base: float | Tensor,
    strength: float | Tensor,
    apply: float | Tensor,
    seed: int,
    step: int,
    counter: Tensor | None,
    stream: int,
    advance: bool,
) -> Results:
    features = [_by_rows(each) for each in features]
    scaled, weight, q, factors = results = _empty(features)
    native.drop_features(
        features,
        scaled,
        ratios,
        _number("base", base),
        _number("strength", strength),
        _number("apply", apply),
        seed % 2**64,
        step if counter is None else counter,
        stream,
        q,
        factors,
        weight,
        advance,
        torch.get_num_threads(),
        _backend.workspace,
    )
    return results


def _reference(
    features: Sequence[Tensor],
    ratios: Tensor,
    base: float | Tensor,
    strength: float | Tensor,
    apply: float | Tensor,
    seed: int,
    step: int,
    counter: Tensor | None,
    stream: int,
    advance: bool,
) -> Results:
    results = reference.drop_features(
        features,
        ratios,
        base=_number("base", base),
        strength=_number("strength", strength),
        apply=_number("apply", apply),
        seed=seed % 2**64,
        step=step if counter is None else counter,
        stream=stream,
    )
    if advance:
        assert counter is not None
        counter.add_(1)
    return results


def _native_gradients(native: ModuleType, grads: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    grads = [_by_rows(each) for each in grads]
    results = [torch.empty_like(each) for each in grads]
    native.drop_features_backward(grads, results, factors, torch.get_num_threads())
    return results


_gradients = Operation(
    "drop_features_backward(Tensor[] grads, Tensor factors) -> Tensor[]",
    device=lambda grads, factors: factors.device,
    native=_native_gradients,
    reference=scaled_rows,
    fake=lambda grads, factors: [torch.empty_like(_by_rows(each)) for each in grads],
)
"""Gradients of the features from those of the results, and what rows were multiplied by."""


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    _, weight, q, factors = output
    ctx.mark_non_differentiable(weight, q, factors)
    ctx.save_for_backward(factors)


_forward = Operation(
    "drop_features(Tensor[] features, Tensor ratios, Tensor base, Tensor strength, Tensor apply, "
    "int seed, int step, Tensor? counter, int stream, bool advance) "
    "-> (Tensor[] features, Tensor weight, Tensor probabilities, Tensor factors)",
    device=lambda features, ratios, *_: ratios.device,
    native=_native,
    reference=_reference,
    fake=_fake,
    backward=_gradients,
    save=_save,
    saved=lambda ctx, grads, *_: (grads, *ctx.saved_tensors),
)
