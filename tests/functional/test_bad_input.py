"""What the user sees of input that cannot be used, and that nothing is written before the check.

The rows of the table in docs/design.md; those about parameters are in tests/methods/test_ogm_ge.py,
those about values that are not numbers in test_modulate.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from mmbal_fast import functional
from mmbal_fast.functional import (
    blended_cross_entropy,
    contribution_scores,
    discrepancy_ratios,
    gradient_moments,
    modulate_,
    modulation_coefficients,
)

if TYPE_CHECKING:
    from tests.conftest import Backend

NAN = math.nan


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(torch.uint8).clone()


@contextmanager
def unchanged(*tensors: Tensor) -> Iterator[None]:
    before = [bits(tensor) for tensor in tensors]
    yield
    assert all(torch.equal(bits(x), y) for x, y in zip(tensors, before, strict=True))


def three_gradients(backend: Backend) -> list[Tensor]:
    return [torch.randn(size, device=backend.device) for size in (5, 6, 5000)]


# --- gradients that cannot be modulated


PLAIN = "must be a plain dense tensor on cpu or cuda"
FLOATS = "must be float32, float64, float16 or bfloat16"
SHARES = "must not share memory between its elements"

BAD_GRADIENTS: dict[str, tuple[Callable[[torch.device], Tensor], type[Exception], str]] = {
    "sparse": (lambda on: torch.eye(3, device=on).to_sparse(), TypeError, PLAIN),
    "sparse rows": (lambda on: torch.eye(3, device=on).to_sparse_csr(), TypeError, PLAIN),
    "meta": (lambda on: torch.ones(3, device="meta"), TypeError, PLAIN),
    "complex": (lambda on: torch.ones(3, device=on) * 1j, TypeError, FLOATS),
    "int64": (lambda on: torch.ones(3, device=on).long(), TypeError, FLOATS),
    "bool": (lambda on: torch.ones(3, device=on).bool(), TypeError, FLOATS),
    "expanded": (
        lambda on: torch.randn(1, 3, device=on).expand(4, 3),
        RuntimeError,
        rf"{SHARES} \(got shape \[4, 3\], strides \(0, 1\)\)",
    ),
    "windows": (
        lambda on: torch.randn(9, device=on).unfold(0, 4, 2),
        RuntimeError,
        rf"{SHARES} \(got shape \[3, 4\], strides \(2, 1\)\)",
    ),
}
GOT = {"sparse": "sparse_coo", "sparse rows": "sparse_csr", "meta": "on meta"}
GOT |= {"complex": "torch.complex64", "int64": "torch.int64", "bool": "torch.bool"}


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("kind", BAD_GRADIENTS)
@pytest.mark.parametrize("position", [0, 2, 4])
def test_gradients(backend: Backend, kind: str, position: int) -> None:
    make, error, rule = BAD_GRADIENTS[kind]
    bad = make(backend.device)
    good = three_gradients(backend)
    grads: list[Tensor | None] = [good[0], good[1], None, good[2]]
    grads.insert(position, bad)
    k = torch.tensor([0.5], device=backend.device)
    where = rf"gradient grads\[{position}\] {rule}"
    for noise in (0.0, 1.0):
        with unchanged(*good), pytest.raises(error, match=f"^modulate_: {where}") as caught:
            modulate_(grads, k, [0] * 5, noise=noise)
        assert GOT.get(kind, "got") in str(caught.value)
    with pytest.raises(error, match=f"^(modulate_|gradient_moments): {where}"), unchanged(*good):
        modulate_(grads, k, [0] * 5, error_if_nonfinite=True)
    with pytest.raises(error, match=f"^gradient_moments: {where}"):
        gradient_moments(grads)


def test_no_tensor_at_all(backend: Backend) -> None:
    good, k = three_gradients(backend), torch.tensor([0.5], device=backend.device)
    with (
        unchanged(*good),
        pytest.raises(TypeError, match=r"^modulate_: gradient grads\[3\] must be.*\(got float\)$"),
    ):
        modulate_([*good, 0.5], k, [0] * 4)  # type: ignore[list-item]
    with pytest.raises(
        TypeError, match=r"^modulate_: grads must be a list or tuple .* \(got NoneType\)$"
    ):
        modulate_(None, k, [0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coefficients": [0.5]}, r"coefficients must be a tensor \(got list\)"),
        ({"step": 1.5}, r"step must be an integer .*\(got float\)"),
        ({"modality": [0, 0.0, 0]}, r"modality\[1\] must be an integer \(got float\)"),
        ({"tensor_ids": [0, "1", 2]}, r"tensor_ids\[1\] must be an integer \(got str\)"),
        ({"offsets": [0, None, 2]}, r"offsets\[1\] must be an integer \(got NoneType\)"),
        ({"seed": 1.5}, r"seed must be an integer \(got 1.5\)"),
    ],
    ids=str,
)
def test_arguments_of_another_kind(
    backend: Backend, arguments: dict[str, Any], message: str
) -> None:
    good = three_gradients(backend)
    given: dict[str, Any] = {"coefficients": torch.tensor([0.5], device=backend.device)}
    with unchanged(*good), pytest.raises(TypeError, match=f"^modulate_: {message}"):
        modulate_(good, **given | {"modality": [0] * 3} | arguments)


def test_same_memory_in_two_modalities(backend: Backend) -> None:
    good, k = three_gradients(backend), torch.tensor([0.5, 1.0], device=backend.device)
    sliced = torch.randn(6, 8, device=backend.device)[:, ::2]
    for shared in (good[0], sliced):
        with (
            unchanged(*good, sliced),
            pytest.raises(
                ValueError,
                match=r"^modulate_: gradient grads\[3\] must belong to one modality and not share "
                r"memory with another \(got modalities 0 and 1",
            ),
        ):
            modulate_([shared, *good[1:], shared], k, [0, 0, 0, 1])


def test_shorter_view_of_another_gradient(backend: Backend) -> None:
    good, k = three_gradients(backend), torch.tensor([0.5], device=backend.device)
    with unchanged(*good), pytest.raises(ValueError, match=r"grads\[1\] must .* not share memory"):
        modulate_([good[0], good[0][:3]], k, [0, 0])


# --- the other arguments of modulate_


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modality": [0, 1]}, r"modality must .* per gradient \(got 2 for 3\)"),
        ({"modality": []}, r"modality must .* per gradient \(got 0 for 3\)"),
        (
            {"modality": [0, 2, 1]},
            r"gradient grads\[1\] must belong to a modality from 0 to 1 \(got 2\)",
        ),
        (
            {"modality": [0, 1, -1]},
            r"gradient grads\[2\] must belong to a modality from 0 to 1 \(got -1\)",
        ),
        ({"tensor_ids": [1, 2]}, r"tensor_ids must hold one .* per gradient \(got 2 for 3"),
        ({"offsets": [1, 2, 3, 4]}, r"offsets must hold one .* per gradient \(got 4 for 3"),
        ({"noise": -1.0}, r"noise must be a number from 0 on \(got -1.0\)"),
        ({"noise": NAN}, r"noise must be a number from 0 on \(got nan\)"),
        ({"noise": math.inf}, r"noise must be a number from 0 on \(got inf\)"),
        ({"eps": -1e-8}, r"eps must be a number from 0 on \(got -1e-08\)"),
        ({"eps": NAN}, r"eps must be a number from 0 on \(got nan\)"),
        ({"seed": 2**64}, r"seed must be from 0 to 2\^64 - 1 \(got 18446744073709551616\)"),
        ({"seed": -1}, r"seed must be from 0 to 2\^64 - 1 \(got -1\)"),
        (
            {"tensor_ids": [0, 2**32 + 7, 1]},
            r"tensor_ids\[1\] must be from 0 to \d+ \(got 4294967303\)",
        ),
        ({"tensor_ids": [0, 1, -1]}, r"tensor_ids\[2\] must be from 0 to 4294967295 \(got -1\)"),
        ({"offsets": [-1, 0, 0]}, r"offsets\[0\] must be from 0 to \d+ \(got -1\)"),
        (
            {"offsets": [0, 0, 2**63]},
            r"offsets\[2\] must be from 0 to \d+ \(got 9223372036854775808\)",
        ),
        (
            {"offsets": [0, 0, 2**63 - 5000]},
            r"offsets\[2\] must leave room for 5000 elements below 2\^63 \(got \d+\)",
        ),
        ({"step": 2**63}, r"step must be from -\d+ to 9223372036854775807 \(got \d+\)"),
        ({"step": torch.ones(2).long()}, r"step must have one element \(got shape \[2\]\)"),
        ({"step": torch.ones(0).long()}, r"step must have one element \(got shape \[0\]\)"),
        ({"moments": torch.zeros(2, 3).double()}, r"moments must have shape \[3, 3\] \(got"),
        ({"moments": torch.zeros(3, 2).double()}, r"moments must have shape \[3, 3\] \(got"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_of_modulate(backend: Backend, arguments: dict[str, Any], message: str) -> None:
    good = three_gradients(backend)
    given: dict[str, Any] = {"modality": [0, 0, 1]} | arguments
    for name, value in given.items():
        if isinstance(value, Tensor):
            given[name] = value.to(backend.device)
    k = torch.tensor([0.5, 1.0], device=backend.device)
    with unchanged(*good), pytest.raises(ValueError, match=f"^modulate_: {message}"):
        modulate_(good, k, **given)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_types_of_tensor_arguments(backend: Backend, noise: float) -> None:
    good, device = three_gradients(backend), backend.device
    k = torch.tensor([0.5], device=device)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"coefficients": k.double()}, r"coefficients must be float32 \(got torch.float64\)"),
        ({"step": torch.tensor([1.0], device=device)}, r"step must be int64 \(got torch.float32\)"),
        ({"step": torch.ones(1).int().to(device)}, r"step must be int64 \(got torch.int32\)"),
        (
            {"moments": torch.zeros(3, 3, device=device)},
            r"moments must be float64 \(got torch.float32\)",
        ),
        ({"status": torch.zeros(1, device=device)}, r"status must be int32 \(got torch.float32\)"),
    ]
    for arguments, message in cases:
        given: dict[str, Any] = {"coefficients": k, "modality": [0] * 3, "noise": noise} | arguments
        with unchanged(*good), pytest.raises(TypeError, match=f"^modulate_: {message}$"):
            modulate_(good, **given)


# --- what is of another kind, whatever the operation


def of_another_kind(on: torch.device) -> dict[str, Callable[[], object]]:
    """Calls in which one argument is no tensor, number or list as it should be."""
    x, k = torch.ones(3, device=on), torch.tensor([0.5], device=on)
    logits, target = [torch.ones(3, 2, device=on)] * 2, torch.tensor([0, 1, 1], device=on)
    numbers = [1.0, 0.5]
    o: Any = functional
    return {
        "modulate_: grads must be a list or tuple of tensors": lambda: o.modulate_("1", k, [0]),
        "modulate_: gradient grads[0] must be a plain": lambda: o.modulate_(["1"], k, [0]),
        "modulate_: modality must": lambda: o.modulate_([x], k, None),
        "modulate_: tensor_ids must": lambda: o.modulate_([x], k, [0], tensor_ids=iter([0])),
        "modulate_: offsets must": lambda: o.modulate_([x], k, [0], offsets=3),
        "modulate_: status must be": lambda: o.modulate_([x], k, [0], status=0),
        "modulate_: moments must": lambda: o.modulate_(
            [x], k, [0], moments="1", error_if_nonfinite=True
        ),
        "modulate_: noise must be one number": lambda: o.modulate_([x], k, [0], noise=10**400),
        "gradient_moments: gradient grads[1] must be": lambda: o.gradient_moments([x, 0.5]),
        "gradient_dots: first[1] must be": lambda: o.gradient_dots([x, 0.5], [x, x]),
        "squared_norms: tensors must": lambda: o.squared_norms(x, [0]),
        "squared_norms: gradient grads[0] must": lambda: o.squared_norms([0.5], [0]),
        "squared_norms: groups must": lambda: o.squared_norms([x], iter([0])),
        "squared_norms: groups[0] must": lambda: o.squared_norms([x], ["1"]),
        "squared_norms: num_groups must": lambda: o.squared_norms([x], [0], num_groups=1.5),
        "noise_like: tensor must be a plain dense": lambda: o.noise_like(0.5, seed=0, step=0),
        "noise_like: tensor must be a plain dense tensor on": lambda: o.noise_like(
            torch.eye(3, device=on).to_sparse(), seed=0, step=0
        ),
        "noise_like: step must be int64": lambda: o.noise_like(x, seed=0, step=k),
        "contribution_scores: logits must be a list": lambda: o.contribution_scores(None, target),
        "contribution_scores: logits must be dense": lambda: o.contribution_scores(
            [logits[0].to_sparse()], target
        ),
        "contribution_scores: target must be dense": lambda: o.contribution_scores(
            logits, target.to_sparse()
        ),
        "contribution_scores: ignore_index must": lambda: o.contribution_scores(
            logits, target, ignore_index="0"
        ),
        "contribution_scores: class_dim must": lambda: o.contribution_scores(
            logits, target, class_dim=None
        ),
        "discrepancy_ratios: scores must": lambda: o.discrepancy_ratios(numbers),
        "modulation_coefficients: ratios must": lambda: o.modulation_coefficients(
            x.to_sparse(), 0.1
        ),
        "blended_cross_entropy: weights must be a tensor or numbers": (
            lambda: o.blended_cross_entropy(logits, target, None)
        ),
        "blended_cross_entropy: label_smoothing must": lambda: o.blended_cross_entropy(
            logits, target, numbers, label_smoothing=None
        ),
        "blending_weights: val_before must": lambda: o.blending_weights(
            numbers, None, numbers, numbers
        ),
        "blending_weights: floor must": lambda: o.blending_weights(*[numbers] * 4, floor="1"),
        "overfitting_to_generalization_ratio: val_after must": (
            lambda: o.overfitting_to_generalization_ratio(*[numbers] * 3, x * 1j)
        ),
    }


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("message", of_another_kind(torch.device("cpu")))
def test_arguments_of_another_kind_in_any_operation(backend: Backend, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        of_another_kind(backend.device)[message]()


# --- devices


def test_gradients_on_several_kinds_of_device(backend: Backend) -> None:
    if backend.name != "cuda":
        pytest.skip("needs a GPU")
    here, there = torch.randn(5, device="cuda"), torch.randn(5)
    for k in (torch.tensor([0.5]), torch.tensor([0.5], device="cuda")):
        with unchanged(here, there), pytest.raises(ValueError, match=r"cpu.*cuda|cuda.*cpu"):
            modulate_([here, there], k, [0, 0])
    with unchanged(here), pytest.raises(ValueError, match=r"\(got cpu and cuda:0\)"):
        modulate_([here], torch.tensor([0.5]), [0])
    with unchanged(there), pytest.raises(ValueError, match=r"cpu.*cuda|cuda.*cpu"):
        modulate_([there], torch.tensor([0.5], device="cuda"), [0])
    rows = gradient_moments([here, there])
    assert rows[:, 0].tolist() == [5, 5]


def test_logits_on_another_device_than_labels(backend: Backend) -> None:
    """Meta stands for any other device."""
    logits = [torch.zeros(4, 3, device=backend.device), torch.zeros(4, 3, device="meta")]
    target = torch.zeros(4, dtype=torch.long, device=backend.device)
    with pytest.raises(
        ValueError,
        match=rf"^contribution_scores: logits and target must be on one device "
        rf"\(got meta and {backend.device.type}",
    ):
        contribution_scores(logits, target)


# --- logits and labels


def batch(backend: Backend) -> tuple[list[Tensor], Tensor]:
    logits = [torch.randn(4, 3, device=backend.device) for _ in range(2)]
    return logits, torch.tensor([0, 1, 2, 1], device=backend.device)


@pytest.mark.parametrize("label", [3, -1, -101, 2**40, -(2**63)])
def test_label_out_of_range(backend: Backend, label: int) -> None:
    logits, target = batch(backend)
    target[2] = label
    if backend.cuda_kernels:  # known when the device is asked: OGMGE.check
        others = torch.tensor([0, 1, -100, 1], device=backend.device)
        assert torch.equal(contribution_scores(logits, target), contribution_scores(logits, others))
        return
    with pytest.raises(
        IndexError,
        match=rf"^contribution_scores: target must be in \[0, 3\) or ignore_index "
        rf"\(got {label} at 2\)$",
    ):
        contribution_scores(logits, target)


@pytest.mark.parametrize(
    ("shapes", "target", "message"),
    [
        ([(4, 3), (4, 2)], (4,), r"logits must have one shape .*\(got \[\[4, 3\], \[4, 2\]\]\)"),
        ([(4, 3), (5, 3)], (4,), r"logits must have one shape .*\(got \[\[4, 3\], \[5, 3\]\]\)"),
        ([(4, 3), (4, 3, 1)], (4,), r"logits must have one shape .*\[4, 3, 1\]\]\)"),
        ([(4,), (4,)], (4,), r"logits must have one shape \[B, C\].*\(got \[\[4\], \[4\]\]\)"),
        ([(4, 0), (4, 0)], (4,), r"logits must be of at least two classes; .* \(got \[4, 0\]"),
        ([(4, 1), (4, 1)], (4,), r"logits must be of at least two classes; .* \(got \[4, 1\]"),
        (
            [(4, 3), (4, 3)],
            (5,),
            r"target must have shape \[4\] as integer labels for logits of shape \[4, 3\] "
            r"\(got \[5\], torch.int64\)",
        ),
        (
            [(4, 3, 6), (4, 3, 6)],
            (4,),
            r"target must have shape \[4, 6\] as integer labels for logits of shape \[4, 3, 6\] "
            r"\(got \[4\], torch.int64\)",
        ),
        ([], (4,), r"logits must hold at least one tensor \(got none\)"),
    ],
)
def test_shapes(
    backend: Backend, shapes: list[tuple[int, ...]], target: tuple[int, ...], message: str
) -> None:
    logits = [torch.zeros(shape, device=backend.device) for shape in shapes]
    labels = torch.zeros(target, dtype=torch.long, device=backend.device)
    with pytest.raises(ValueError, match=f"^contribution_scores: {message}"):
        contribution_scores(logits, labels)


def test_shape_of_soft_labels(backend: Backend) -> None:
    logits, target = batch(backend)
    with pytest.raises(
        ValueError,
        match=r"target must have shape \[4, 3\] as soft labels \(floating point\) for .* "
        r"\[4, 3\] \(got \[4\], torch.float32\)",
    ):
        contribution_scores(logits, target.float())


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        ([[1.0, 1.0, 0.0]] * 4, "sums from 2 to 2, least entry 0"),
        ([[1.5, -0.5, 0.0]] * 4, "sums from 1 to 1, least entry -0.5"),
        ([[1.0, 0.0, 0.0]] * 3 + [[0.0] * 3], "sums from 0 to 1, least entry 0"),
        ([[NAN, 0.0, 0.0]] * 4, "sums from nan to nan, least entry nan"),
    ],
    ids=["multi-label", "negative", "none", "nan"],
)
def test_soft_labels_that_are_no_distribution(
    backend: Backend, rows: list[list[float]], got: str
) -> None:
    if backend.device.type != "cpu":
        pytest.skip("values are not read on a GPU")
    logits, soft = batch(backend)[0], torch.tensor(rows)
    message = rf": soft labels must not be negative and must add up to 1 .* \(got {got}\)$"
    with pytest.raises(ValueError, match="^contribution_scores" + message):
        contribution_scores(logits, soft)
    with pytest.raises(ValueError, match="^blended_cross_entropy" + message):
        blended_cross_entropy(logits, soft, [0.5, 0.5])


def test_no_tensors() -> None:
    logits, target = [torch.zeros(2, 3)] * 2, torch.zeros(2, dtype=torch.long)
    with pytest.raises(TypeError, match=r"contribution_scores: target must be a tensor \(got list"):
        contribution_scores(logits, [0, 1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"contribution_scores: logits must be tensors \(got list"):
        contribution_scores([[[0.0]]], target)  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_types_of_labels(backend: Backend, dtype: torch.dtype) -> None:
    logits, target = batch(backend)
    with pytest.raises(
        TypeError,
        match=rf"^contribution_scores: target must be integer labels .* \(got {dtype}\)$",
    ):
        contribution_scores(logits, target.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_types_of_logits(backend: Backend, dtype: torch.dtype) -> None:
    logits, target = batch(backend)
    with pytest.raises(
        TypeError, match=rf"^contribution_scores: logits must be float32.*\(got {dtype}\)$"
    ):
        contribution_scores([logits[0], logits[1].to(dtype)], target)


# --- ratios and coefficients


@pytest.mark.parametrize(
    "scores", [torch.ones(1), torch.ones(2, 2), torch.ones(2).long(), torch.ones(())]
)
def test_scores_that_are_no_vector(backend: Backend, scores: Tensor) -> None:
    expected = re.escape(f"(got {scores.dtype} of shape {list(scores.shape)})")
    with pytest.raises(ValueError, match=rf"^discrepancy_ratios: scores must be .*{expected}$"):
        discrepancy_ratios(scores.to(backend.device))


@pytest.mark.parametrize("alpha", [-0.1, NAN, math.inf])
@pytest.mark.parametrize("rule", ["cvpr2022", "tpami2024"])
def test_alpha(backend: Backend, alpha: float, rule: Any) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^modulation_coefficients: alpha must be a number from 0 on \(got {alpha}\)$",
    ):
        modulation_coefficients(torch.ones(2, device=backend.device), alpha, rule=rule)


@pytest.mark.parametrize("rule", ["cvpr2023", None, "none"])
def test_unknown_rule(backend: Backend, rule: Any) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^modulation_coefficients: rule must be one of cvpr2022, .* \(got {rule!r}\)$",
    ):
        modulation_coefficients(torch.ones(2, device=backend.device), 0.5, rule=rule)


def test_rule_that_returns_another_shape(backend: Backend) -> None:
    with pytest.raises(
        ValueError,
        match=r"^modulation_coefficients: the rule must return one coefficient per ratio "
        r"\(got shape \[1\] for \[2\]\)$",
    ):
        modulation_coefficients(torch.ones(2, device=backend.device), 0.5, rule=lambda rho: rho[:1])
