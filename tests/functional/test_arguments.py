"""No argument of the native module reaches past a tensor's memory: each has its type and shape.

`mmbal_fast.functional` checks before; this is what is left for `torch.ops.mmbal` and whoever else
calls the module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from mmbal_fast import _backend

if TYPE_CHECKING:
    from tests.conftest import Backend

Arguments = dict[str, Any]


def workspace(*arguments: Any) -> Tensor:
    return _backend.workspace(*arguments)


def gradients(device: torch.device) -> list[Tensor]:
    return [torch.randn(size, device=device) for size in (5, 4)]


def moments(on: torch.device) -> Arguments:
    return {
        "grads": gradients(on),
        "out": torch.zeros(2, 3, dtype=torch.float64, device=on),
        "names": None,
        "threads": 1,
        "workspace": workspace,
    }


def modulate(on: torch.device) -> Arguments:
    return {
        "grads": gradients(on),
        "coefficients": torch.tensor([0.5, 1.0], device=on),
        "modality": [0, 1],
        "noise": 1.0,
        "seed": 1,
        "step": torch.ones(1, dtype=torch.int64, device=on),
        "tensor_ids": [3, 4],
        "offsets": [0, 8],
        "moments": torch.ones(2, 3, dtype=torch.float64, device=on),
        "eps": 1e-8,
        "status": torch.zeros(1, dtype=torch.int32, device=on),
        "advance": True,
        "names": None,
        "threads": 1,
        "workspace": workspace,
        "inverse_scale": torch.ones((), device=on),
        "found_inf": torch.zeros((), device=on),
    }


def noise(on: torch.device) -> Arguments:
    step = torch.ones(1, dtype=torch.int64, device=on)
    out = torch.zeros(5, device=on)
    return {"out": out, "seed": 1, "step": step, "tensor_id": 0, "offset": 0, "threads": 1}


def scores(on: torch.device) -> Arguments:
    return {
        "logits": [torch.randn(4, 3, device=on) for _ in range(2)],
        "target": torch.tensor([0, 1, 2, 1], device=on),
        "multi_label": False,
        "ignore_index": -100,
        "statistic": 0,
        "state": torch.zeros(3, 2, device=on),
        "accumulate": False,
        **remembered(on),
        "alpha": 0.5,
        "beta": 1.0,
        "rule": 4,
        "status": torch.zeros(1, dtype=torch.int32, device=on),
        "threads": 1,
        "workspace": workspace,
        "as_they_are": False,
    }


def remembered(on: torch.device) -> Arguments:
    return {
        "totals": torch.ones(3, device=on),
        "past": torch.zeros(2, device=on),
        "steps": torch.zeros((), dtype=torch.int64, device=on),
    }


def soft_scores(on: torch.device) -> Arguments:
    return scores(on) | {"target": tuple(torch.rand(4, 3, device=on) for _ in range(2))}


def derive(on: torch.device) -> Arguments:
    numbers = {"ratios": True, "alpha": 0.5, "beta": 1.0, "rule": 4}
    return {"state": torch.ones(3, 2, device=on), **remembered(on), **numbers}


def remember(on: torch.device) -> Arguments:
    counts = torch.ones((), dtype=torch.bool, device=on)
    return remembered(on) | {"scores": torch.ones(2, device=on), "counts": counts, "mean": True}


def cross_entropy(on: torch.device) -> Arguments:
    return {
        "logits": [torch.randn(4, 3, device=on) for _ in range(2)],
        "target": torch.tensor([0, 1, 2, 1], device=on),
        "weights": torch.ones(2, dtype=torch.float64, device=on),
        "smoothing": 0.1,
        "ignore_index": -100,
        "loss": torch.zeros((), device=on),
        "losses": torch.zeros(2, device=on),
        "normalizers": torch.zeros(2, 2, 4, device=on),
        "count": torch.ones((), dtype=torch.int64, device=on),
        "threads": 1,
        "workspace": workspace,
    }


def soft_cross_entropy(on: torch.device) -> Arguments:
    return cross_entropy(on) | {"target": torch.rand(4, 3, device=on)}


def cross_entropy_backward(on: torch.device) -> Arguments:
    given = cross_entropy(on)
    for name in ("loss", "losses", "workspace"):
        del given[name]
    grads = [torch.zeros(4, 3, device=on) for _ in range(2)]
    return given | {"grad": torch.ones((), device=on), "grads": grads}


def speeds(on: torch.device) -> Arguments:
    return {
        "moments": torch.ones(2, 4, 3, dtype=torch.float64, device=on),
        "membership": torch.ones(2, 4, dtype=torch.float64, device=on),
        "totals": torch.zeros(2, dtype=torch.float64, device=on),
        "active": torch.ones((), dtype=torch.bool, device=on),
        "finite": torch.zeros((), dtype=torch.bool, device=on),
    }


def drop_features(on: torch.device) -> Arguments:
    return {
        "features": [torch.randn(4, 3, device=on), torch.randn(4, 2, device=on)],
        "results": [torch.zeros(4, 3, device=on), torch.zeros(4, 2, device=on)],
        "ratios": torch.tensor([2.0, 0.5], device=on),
        "base": 0.5,
        "strength": 0.5,
        "apply": 1.0,
        "seed": 1,
        "step": torch.ones(1, dtype=torch.int64, device=on),
        "stream": 1,
        "probabilities": torch.zeros(2, device=on),
        "factors": torch.zeros(2, 4, device=on),
        "weight": torch.zeros(4, device=on),
        "advance": True,
        "threads": 1,
        "workspace": workspace,
    }


def drop_features_backward(on: torch.device) -> Arguments:
    given = drop_features(on)
    kept = {name: given[name] for name in ("results", "factors", "threads")}
    return {"grads": given["features"], **kept}


OPERATIONS: dict[str, tuple[str, Callable[[torch.device], Arguments]]] = {
    "moments": ("moments", moments),
    "modulate_": ("modulate_", modulate),
    "noise_": ("noise_", noise),
    "scores_": ("scores_", scores),
    "scores_, soft": ("scores_", soft_scores),
    "derive_": ("derive_", derive),
    "remember_": ("remember_", remember),
    "cross_entropy": ("cross_entropy", cross_entropy),
    "cross_entropy, soft": ("cross_entropy", soft_cross_entropy),
    "cross_entropy_backward": ("cross_entropy_backward", cross_entropy_backward),
    "accumulate_speeds_": ("accumulate_speeds_", speeds),
    "drop_features": ("drop_features", drop_features),
    "drop_features_backward": ("drop_features_backward", drop_features_backward),
}
# Their sizes are their own: whatever comes is measured, modulated or filled.
ANY_SHAPE = {("moments", "grads"), ("modulate_", "grads"), ("noise_", "out")}
AS_GOOD = {("modulate_", "coefficients", "one longer")}


def unlike(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors that differ from one in their type, shape or memory."""
    other = torch.int32 if tensor.dtype == torch.bool else torch.bool
    yield "another type", torch.zeros(tensor.shape, dtype=other, device=tensor.device)
    yield "a dimension more", tensor.new_ones((2, *tensor.shape))
    yield "nothing", tensor.new_ones((0,) * max(1, tensor.ndim))
    yield "one longer", tensor.new_ones(tensor.numel() + 1)
    if tensor.numel() > 1:
        yield "one shorter", tensor.new_ones(tensor.numel() - 1)
        yield (
            "flat" if tensor.ndim > 1 else "a column",
            tensor.new_ones(tensor.numel() if tensor.ndim > 1 else (tensor.numel(), 1)),
        )
        for dim in range(tensor.ndim):
            yield f"shorter in {dim}", tensor.narrow(dim, 0, tensor.shape[dim] - 1).contiguous()
        yield "gaps", tensor.repeat_interleave(2, -1)[..., ::2]
    if tensor.ndim > 1:
        yield "another order", tensor.transpose(0, -1).contiguous().transpose(0, -1)
    yield "no memory", tensor.to("meta")


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [each for x in value for each in flat(x)]
    return [value] if isinstance(value, Tensor) else []


def wrong(name: str, on: torch.device) -> Iterator[tuple[str, Arguments]]:
    """Arguments of which one tensor cannot be used, and what is wrong with it."""
    make = OPERATIONS[name][1]
    for argument, value in make(on).items():
        for index, tensor in enumerate(flat(value)):
            for kind, other in unlike(tensor):
                if kind not in ("another type", "no memory") and (
                    (name, argument) in ANY_SHAPE
                    or (name, argument, kind) in AS_GOOD
                    or tensor.numel() == other.numel() == 1
                ):
                    continue
                given = make(on)
                if isinstance(value, Tensor):
                    given[argument] = other
                else:
                    given[argument] = type(value)(
                        other if i == index else each for i, each in enumerate(given[argument])
                    )
                yield f"{argument}, {index}: {kind}", given


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_argument(native: Backend, name: str) -> None:
    operation, make = OPERATIONS[name]
    run = getattr(native.native, operation)
    assert run(**make(native.device)) is None
    seen = set()
    for what, given in wrong(name, native.device):
        tensors = [each for each in flat(list(given.values())) if not each.is_meta]
        before = [each.clone() for each in tensors]
        with pytest.raises((TypeError, ValueError), match=r"^[a-z_ ]+: .* must "):
            run(**given)
        for x, y in zip(tensors, before, strict=True):
            assert torch.equal(x, y), what
        seen.add(what.split(",")[0])
    assert seen == {each for each, value in make(native.device).items() if flat(value)}


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("logits", [], "contribution_scores: logits must hold at least one tensor (got none)"),
        ("target", (torch.ones(4, 3),), "target must be soft labels for each of the logits (got 1"),
        ("rule", 7, "rule must be a number from 0 to 6 (got 7)"),
        ("rule", -1, "rule must be a number from 0 to 6 (got -1)"),
        ("statistic", 3, "statistic must be a number from 0 to 2 (got 3)"),
    ],
)
def test_scores(native: Backend, argument: str, value: Any, message: str) -> None:
    assert native.native is not None
    with pytest.raises(ValueError, match=re.escape(message)):
        native.native.scores_(**scores(native.device) | {argument: value})


def test_heads_of_two_widths(native: Backend) -> None:
    assert native.native is not None
    given = cross_entropy(native.device)
    for wide in (0, 1):
        logits = [each.double() if i == wide else each for i, each in enumerate(given["logits"])]
        with pytest.raises(TypeError, match="logits must all be float64 or none of them"):
            native.native.cross_entropy(**given | {"logits": logits})
    given = cross_entropy_backward(native.device)
    with pytest.raises(ValueError, match="gradients must be of the shapes and types of the logits"):
        native.native.cross_entropy_backward(
            **given | {"grads": [each.half() for each in given["grads"]]}
        )
