"""What a tensor's memory is: shared with others, negated, absent, or that of a subclass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mmbal_fast import _backend
from mmbal_fast.functional import (
    blended_cross_entropy,
    contribution_scores,
    gradient_moments,
    modulate_,
)

if TYPE_CHECKING:
    from tests.conftest import Backend


# --- gradients that share memory


def columns(base: Tensor, first: int, end: int) -> Tensor:
    return base[:10000].view(100, 100)[:, first:end]


OVERLAPPING: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "partly": lambda b: [b[:12000], b[8000:]],
    "partly, the later first": lambda b: [b[8000:], b[:12000]],
    "in one element": lambda b: [b[:101], b[100:]],
    "one within the other": lambda b: [b[500:600], b],
    "beginning alike": lambda b: [b[:500], b],
    "as other types": lambda b: [b[:500], b.view(torch.int32)[:500].view(torch.bfloat16)],
    "columns": lambda b: [columns(b, 0, 51), columns(b, 50, 100)],
    "columns of the whole": lambda b: [b, columns(b, 0, 50)],
    "the whole of columns": lambda b: [columns(b, 0, 50), b[9000:]],
    "one of many": lambda b: [*b.split(100), b[10050:10060]],
}
APART: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "side by side": lambda b: [b[100:], b[:100]],
    "columns": lambda b: [columns(b, 0, 50), columns(b, 50, 100), b[10000:]],
    "even and odd": lambda b: [b[::2], b[1::2]],
    "between columns": lambda b: [columns(b, 0, 50), b[60:90], b[10000:]],
    "many": lambda b: list(b.split(7))[::-1],
}


@pytest.mark.parametrize("kind", OVERLAPPING)
@pytest.mark.parametrize("modalities", [1, 2])
def test_gradients_that_overlap(backend: Backend, kind: str, modalities: int) -> None:
    base = torch.randn(16000, device=backend.device)
    before = base.clone()
    grads = OVERLAPPING[kind](base)
    k = torch.full((modalities,), 0.5, device=backend.device)
    with pytest.raises(
        ValueError, match=r"^modulate_: gradient grads\[\d+\] must .* not share memory"
    ):
        modulate_(grads, k, [i % modalities for i in range(len(grads))], noise=0.0)
    assert torch.equal(base, before)


@pytest.mark.parametrize("kind", APART)
def test_gradients_side_by_side(backend: Backend, kind: str) -> None:
    base = torch.randn(16000, device=backend.device)
    grads = APART[kind](base)
    expected = [grad * 0.5 for grad in grads]
    modulate_(grads, torch.tensor([0.5], device=backend.device), [0] * len(grads), noise=0.0)
    assert all(torch.equal(x, y) for x, y in zip(grads, expected, strict=True))


@pytest.mark.parametrize("stride", [1, 2])
def test_gradient_listed_twice(backend: Backend, stride: int) -> None:
    base = torch.randn(50, device=backend.device)
    expected = base.clone()
    expected[::stride] *= 0.5
    grads = [base[::stride], torch.ones(3, device=backend.device), base[::stride]]
    modulate_(grads, torch.tensor([0.5], device=backend.device), [0] * 3, noise=0.0)
    assert torch.equal(base, expected)


# --- negated views

NEGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: torch._neg_view(x.clone()),
    "gaps": lambda x: torch.complex(x, -x).conj().imag,
    "one element": lambda x: torch.complex(x[:1], -x[:1]).conj().imag,
}


@pytest.mark.parametrize("kind", NEGATED)
def test_negated_gradients(backend: Backend, kind: str) -> None:
    grad = NEGATED[kind](torch.randn(5000, device=backend.device) + 3)
    assert grad.is_neg()
    plain = grad.resolve_neg().clone()
    other = torch.randn(7, device=backend.device)
    assert torch.equal(gradient_moments([other, grad])[1], gradient_moments([plain])[0])
    k = torch.tensor([0.5], device=backend.device)
    modulate_([other.clone(), plain], k, [0, 0], seed=1)
    modulate_([other.clone(), grad], k, [0, 0], seed=1)
    assert torch.equal(grad.resolve_neg(), plain)


def test_gradient_beside_its_negation(backend: Backend) -> None:
    grad = torch.randn(50, device=backend.device)
    before = grad.clone()
    with pytest.raises(ValueError, match="not share memory"):
        modulate_([grad, torch._neg_view(grad)], torch.ones(1, device=backend.device), [0, 0])
    assert torch.equal(grad, before)


def test_negated_logits(backend: Backend) -> None:
    values = torch.randn(12, device=backend.device)
    labels = torch.tensor([0, 1, 2, 1], device=backend.device)
    other = torch.randn(4, 3, device=backend.device)
    for kind in ("gaps", "dense"):
        negated = NEGATED[kind](values).view(4, 3)
        plain = negated.resolve_neg()
        assert negated.is_neg()
        for target in (labels, other.softmax(1)):
            expected = contribution_scores([plain, other], target)
            assert torch.equal(contribution_scores([negated, other], target), expected)
            loss = blended_cross_entropy([negated, other], target, [0.5, 0.5])[0]
            assert torch.equal(loss, blended_cross_entropy([plain, other], target, [0.5, 0.5])[0])


def test_negated_coefficients(backend: Backend) -> None:
    grad = torch.ones(5, device=backend.device)
    k = torch._neg_view(torch.tensor([-0.5], device=backend.device))
    with pytest.raises(TypeError, match=r"coefficients must .* \(got negated view, resolve_neg"):
        modulate_([grad], k, [0])
    assert torch.equal(grad, torch.ones(5, device=backend.device))


def test_negation_is_known_without_asking_torch(native: Backend) -> None:
    """Else it still is, at the cost of a fifth of a step's host side."""
    assert native.native is not None
    assert native.native.reads_negative_bit()


# --- no memory of their own


class Wrapper(Tensor):
    """As sharded and quantized tensors are: its elements are elsewhere."""

    @staticmethod
    def __new__(cls, elements: Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, elements.shape, dtype=elements.dtype, device=elements.device
        )

    def __init__(self, elements: Tensor) -> None:
        self.elements = elements

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(str(func))


def fake(device: torch.device) -> Tensor:
    with FakeTensorMode():
        return torch.ones(3, device=device)


def refused(tensor: Tensor, k: Tensor, kind: str) -> None:
    for call in (lambda: gradient_moments([tensor]), lambda: modulate_([tensor], k, [0])):
        with pytest.raises(TypeError, match=rf"grads\[0\] must be a plain dense tensor .*{kind}"):
            call()


def test_tensors_without_plain_memory(native: Backend) -> None:
    k = torch.ones(1, device=native.device)
    refused(Wrapper(torch.ones(3, device=native.device)), k, r"test_memory\.Wrapper, torch.strided")
    refused(fake(native.device), k, r"torch\._subclasses\.fake_tensor\.FakeTensor")
    zeros = torch._efficientzerotensor(3, device=native.device)
    refused(zeros, k, "Tensor of zeros without memory")


def test_the_reference_refuses_them_too() -> None:
    on = torch.device("cpu")
    with _backend.using(None):
        for tensor in (Wrapper(torch.ones(3)), fake(on), torch._efficientzerotensor(3)):
            refused(tensor, torch.ones(1), "float32 on cpu")


@pytest.mark.parametrize("transform", ["grad", "vmap", "functionalize"])
def test_tensors_within_a_transform(native: Backend, transform: str) -> None:
    """Operations say it before; this is what the module says for itself."""
    out = torch.zeros(1, 3, dtype=torch.float64, device=native.device)
    kind = "functionalized" if transform == "functionalize" else "Tensor within a transform of"

    def total(x: Tensor) -> Tensor:
        assert native.native is not None
        with pytest.raises(TypeError, match=rf"grads\[0\] must be a plain dense tensor .*{kind}"):
            native.native.moments([x], out, None, 1, _backend.workspace)
        return x.sum()

    shape = (2, 3) if transform == "vmap" else (3,)
    getattr(torch.func, transform)(total)(torch.ones(shape, device=native.device))


# --- subclasses with memory


class WithMetadata(Tensor):
    """As images of imaging libraries are: a tensor with something beside it."""

    note = "left"


def noted(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(WithMetadata)


def test_subclass_that_carries_metadata(backend: Backend) -> None:
    device = backend.device
    grad, k = torch.randn(50, device=device), torch.tensor([0.5], device=device)
    logits = [torch.randn(4, 3, device=device) for _ in range(2)]
    target = torch.tensor([0, 1, 2, 1], device=device)
    assert torch.equal(gradient_moments([noted(grad)]), gradient_moments([grad]))
    expected = grad.clone()
    modulate_([expected], k, [0], seed=1)
    given = noted(grad.clone())
    modulate_([given], k, [0], seed=1)
    assert torch.equal(given.as_subclass(Tensor), expected)
    assert type(given) is WithMetadata
    for labels in (target, logits[0].softmax(1)):
        scores = contribution_scores([noted(each) for each in logits], noted(labels))
        assert type(scores) is Tensor
        assert torch.equal(scores, contribution_scores(logits, labels))
        inputs = [noted(each.clone()).requires_grad_() for each in logits]
        plain = [each.clone().requires_grad_() for each in logits]
        loss, _ = blended_cross_entropy(inputs, noted(labels), [0.5, 0.5])
        loss.backward()  # type: ignore[no-untyped-call]
        blended_cross_entropy(plain, labels, [0.5, 0.5])[0].backward()  # type: ignore[no-untyped-call]
        for x, y in zip(inputs, plain, strict=True):
            assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


# --- lists that change under the call


class ClearingIndex:
    """An index whose reading empties lists."""

    def __init__(self, *lists: list[Any]) -> None:
        self.lists = lists

    def __index__(self) -> int:
        for each in self.lists:
            each.clear()
        return 0


def test_index_that_clears_the_lists(native: Backend) -> None:
    grads = [torch.ones(5, device=native.device) for _ in range(50)]
    views = list(grads)
    k = torch.tensor([0.5], device=native.device)
    modality: list[Any] = [0] * 50
    modality[0] = ClearingIndex(grads, modality)
    modulate_(grads, k, modality, noise=0.0)
    assert all(torch.equal(each, torch.full_like(each, 0.5)) for each in views)


def test_iterator_of_gradients(backend: Backend) -> None:
    grads = [torch.ones(5, device=backend.device) for _ in range(2)]
    k = torch.tensor([0.5], device=backend.device)
    for given in ((each for each in grads), set(grads), {"a": grads[0]}):
        with pytest.raises(
            TypeError, match=r"^modulate_: grads must be a list or tuple of .* \(got"
        ):
            modulate_(given, k, [0, 0])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^gradient_moments: grads must be a list or tuple"):
            gradient_moments(given)  # type: ignore[arg-type]
    assert torch.equal(grads[0], torch.ones(5, device=backend.device))
