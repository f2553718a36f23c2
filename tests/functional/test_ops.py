"""The operations as torch.ops.mmbal.*: schemas, shape inference, torch.compile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from mmbal_fast import functional

if TYPE_CHECKING:
    from tests.conftest import Backend

OPS = torch.ops.mmbal


def arguments(device: torch.device) -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """For each operation calls that reach every optional argument."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    logits, labels = [random(4, 3), random(4, 3)], torch.tensor([0, 1, 2, -100], device=device)
    grads = [random(5), random(3, 4), random(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    grads += [random(6, 8)[:, ::2], random(7).double(), random(7).half(), random(7).bfloat16()]
    grads += [random(0)]
    count = len(grads)
    k = torch.tensor([0.5, 1.0], device=device)
    numbers: dict[str, Any] = {
        "noise": 1.0,
        "seed": -3,
        "step": 5,
        "counter": None,
        "tensor_ids": None,
        "offsets": None,
        "moments": None,
        "eps": 1e-8,
        "status": None,
        "advance": False,
    }
    modality = [i % 2 for i in range(count)]
    every = numbers | {
        "counter": torch.tensor([5], device=device),
        "tensor_ids": [7 * i for i in range(count)],
        "offsets": list(range(count)),
        "moments": torch.tensor([[9.0, 0.0, 4.0]] * count, dtype=torch.float64, device=device),
        "status": torch.zeros(1, dtype=torch.int32, device=device),
        "advance": True,
    }
    state = torch.ones(3, 2, device=device)
    status = torch.zeros(1, dtype=torch.int32, device=device)
    return {
        "contribution_scores": [
            ((logits, labels, -100), {}),
            ((logits, logits[0], -100), {}),
            (([each.clone().requires_grad_() for each in logits], labels, -100), {}),
        ],
        "discrepancy_ratios": [((torch.rand(3, generator=generator).to(device),), {})],
        "modulation_coefficients": [
            ((3 * torch.rand(3, generator=generator).to(device), 0.5, rule), {})
            for rule in ("cvpr2022", "cvpr2022_excess", "tpami2024")
        ],
        "observe_": [
            ((state, logits, labels, -100, accumulate, 0.5, "cvpr2022", each), {})
            for accumulate, each in ((False, None), (True, status))
        ],
        "derive_": [((state, ratios, 0.5, "tpami2024"), {}) for ratios in (False, True)],
        "gradient_moments": [((grads,), {})],
        "modulate_": [((grads, k, modality), numbers), ((grads, k, modality), every)],
        "noise_like": [
            ((grads[0], -3, 5, None, 7, 1), {}),
            ((grads[2], 3, 0, torch.tensor([5], device=device), 2**32 - 1, 2**40), {}),
            ((grads[3], 3, 0, None, 0, 0), {}),
        ],
    }


@pytest.mark.parametrize("name", arguments(torch.device("cpu")))
def test_opcheck(native: Backend, name: str) -> None:
    if native.name == "cuda-emulated":
        pytest.skip("what is checked does not depend on the kernels")
    for args, kwargs in arguments(native.device)[name]:
        opcheck(getattr(OPS, name).default, args, kwargs)


def modulated(grads: list[Tensor], k: Tensor, step: Tensor) -> None:
    functional.modulate_(grads, k, [0, 1, 0], noise=1.0, seed=2**63 + 1, step=step)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # by torch's inductor itself
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_modulate(backend: Backend, compiler: str) -> None:
    if backend.name == "cuda-emulated" or (compiler == "inductor" and backend.name == "reference"):
        pytest.skip("the compiler sees one operation, whatever runs it")
    grads = [torch.randn(5), torch.randn(300, 40), torch.randn(6, 8)[:, ::2]]
    grads = [grad.to(backend.device) for grad in grads]
    twins = [grad.clone() for grad in grads]
    k, step = torch.tensor([0.5, 1.0]).to(backend.device), torch.tensor([3]).to(backend.device)

    @torch.compile(fullgraph=True, backend=compiler)
    def train_step(grads: list[Tensor], k: Tensor, step: Tensor) -> Tensor:
        doubled = [2 * grad for grad in grads]
        modulated(doubled, k * 1, step)
        modulated(grads, k, step)
        return torch.stack([each.sum() for each in doubled])

    sums = train_step(grads, k, step)
    doubled = [2 * grad for grad in twins]
    modulated(doubled, k, step)
    modulated(twins, k, step)
    for one, other in zip(grads, twins, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(sums, torch.stack([each.sum() for each in doubled]))


def test_compiled_with_missing_gradients(backend: Backend) -> None:
    """None is dropped from the operation's list; the others keep their number and noise."""
    grads = [torch.randn(5, device=backend.device), None, torch.randn(4, device=backend.device)]
    twins = [None if grad is None else grad.clone() for grad in grads]
    k = torch.tensor([0.5, 1.0], device=backend.device)

    def train_step(grads: list[Tensor | None], k: Tensor) -> Tensor:
        moments = functional.gradient_moments(grads)
        functional.modulate_(grads, k, [0, 1, 1], tensor_ids=[4, 5, 6], offsets=[0, 1, 2])
        functional.modulate_(grads, k, [0, 1, 1], moments=moments, noise=0.5)
        return moments

    moments = torch.compile(train_step, fullgraph=True, backend="aot_eager")(grads, k)
    assert torch.equal(moments, train_step(twins, k))
    for one, other in zip(grads, twins, strict=True):
        assert one is other is None or torch.equal(one, other)  # type: ignore[arg-type]


def test_compiled_scores(backend: Backend) -> None:
    logits = [torch.randn(6, 4, device=backend.device, requires_grad=True) for _ in range(3)]
    target = torch.tensor([0, 1, 2, 3, -100, 0], device=backend.device)

    def coefficients(logits: list[Tensor], target: Tensor) -> tuple[Tensor, ...]:
        scores = functional.contribution_scores([2 * each for each in logits], target)
        ratios = functional.discrepancy_ratios(scores)
        return scores, ratios, functional.modulation_coefficients(ratios, 0.3, rule="tpami2024")

    compiled = torch.compile(coefficients, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(logits, target), coefficients(logits, target), strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


def test_compiled_callable_rule(backend: Backend) -> None:
    ratios = torch.tensor([2.0, 0.5], device=backend.device)

    def run(ratios: Tensor) -> Tensor:
        return functional.modulation_coefficients(ratios, 0.0, rule=lambda rho: 1 / rho)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert compiled(ratios).tolist() == run(ratios).tolist() == [0.5, 2.0]


def test_compiled_noise(backend: Backend) -> None:
    like = torch.empty(5, 4, device=backend.device)
    step = torch.tensor([3], device=backend.device)

    def run(like: Tensor, step: Tensor) -> Tensor:
        some = functional.noise_like(like, seed=2**64 - 1, step=step, tensor_id=4, offset=2)
        return some + functional.noise_like(like, seed=7, step=9)

    assert torch.equal(
        torch.compile(run, fullgraph=True, backend="aot_eager")(like, step), run(like, step)
    )
