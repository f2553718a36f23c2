"""The operations as `torch.ops.mmbal.*`, for torch.compile, export and the dispatcher.

Eager calls of `mmbal_fast.functional` do not come this way: for a list of a thousand tensors the
dispatcher alone takes longer than the kernels' whole host side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmbal_fast.functional import _modulate, _moments, _noise, _scores

_library = torch.library.Library("mmbal", "FRAGMENT")  # type: ignore[no-untyped-call]


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    # Nothing here is differentiable: results are without graph, as those of the eager calls.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"mmbal::{name}", fake, lib=_library)


def _nothing(*args: object, **kwargs: object) -> None:
    """Shape inference of operations that only write to their arguments."""


def _modulate_(
    grads: Sequence[Tensor],
    coefficients: Tensor,
    modality: Sequence[int],
    *,
    noise: float,
    seed: int,
    step: int,
    counter: Tensor | None,
    tensor_ids: Sequence[int] | None,
    offsets: Sequence[int] | None,
    moments: Tensor | None,
    eps: float,
    status: Tensor | None,
    advance: bool,
) -> None:
    _modulate.eager_(
        grads,
        _modulate.Update(
            coefficients,
            modality,
            noise,
            seed % 2**64,
            step if counter is None else counter,
            tensor_ids,
            offsets,
            moments,
            eps,
            status,
            advance,
        ),
    )


def _noise_like(
    tensor: Tensor, seed: int, step: int, counter: Tensor | None, tensor_id: int, offset: int
) -> Tensor:
    now = step if counter is None else counter
    return _noise.noise_like_eager(tensor, seed % 2**64, now, tensor_id, offset)


_define(
    "contribution_scores(Tensor[] logits, Tensor target, int ignore_index) -> Tensor",
    _scores.contribution_scores_eager,
    lambda logits, target, ignore_index: target.new_empty(len(logits), dtype=torch.float32),
)
_define(
    "discrepancy_ratios(Tensor scores) -> Tensor",
    _scores.discrepancy_ratios_eager,
    lambda scores: scores.new_empty(scores.shape, dtype=torch.float32),
)
_define(
    "modulation_coefficients(Tensor ratios, float alpha, str rule) -> Tensor",
    _scores.modulation_coefficients_eager,
    lambda ratios, alpha, rule: ratios.new_empty(ratios.shape, dtype=torch.float32),
)
_define(
    "observe_(Tensor(a!) state, Tensor[] logits, Tensor target, int ignore_index, bool accumulate, "
    "float alpha, str rule, Tensor(b!)? status) -> ()",
    _scores.observe_eager_,
    _nothing,
)
_define(
    "derive_(Tensor(a!) state, bool ratios, float alpha, str rule) -> ()",
    _scores.derive_eager_,
    _nothing,
)
_define(
    "gradient_moments(Tensor[] grads) -> Tensor",
    _moments.gradient_moments_eager,
    lambda grads: grads[0].new_empty((len(grads), 3), dtype=torch.float64),
)
_define(
    "modulate_(Tensor(a!)[] grads, Tensor coefficients, int[] modality, *, float noise, int seed, "
    "int step, Tensor(b!)? counter, int[]? tensor_ids, int[]? offsets, Tensor? moments, float eps, "
    "Tensor(c!)? status, bool advance) -> ()",
    _modulate_,
    _nothing,
)
_define(
    "noise_like(Tensor tensor, int seed, int step, Tensor? counter, int tensor_id, int offset) "
    "-> Tensor",
    _noise_like,
    lambda tensor, seed, step, counter, tensor_id, offset: torch.empty_like(tensor),
)
