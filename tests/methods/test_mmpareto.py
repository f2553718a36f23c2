"""MMPareto against worked values and a literal transcription of the released solver."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.functional import cross_entropy

import mmbal_fast
from mmbal_fast.bench._baselines import published_pareto_
from mmbal_fast.bench._measure import count
from tests.host_reads import host_reads
from tests.methods.cases import NAMES, Net, batch_of, filled

if TYPE_CHECKING:
    from tests.conftest import Backend


def combined(g1: list[float], g2: list[float], device: Any = "cpu", gamma: float = 1.5) -> Tensor:
    """What one tensor gets, beside a modality without conflict."""
    theta = {name: nn.Parameter(torch.zeros(len(g1), device=device)) for name in "ab"}
    pareto = mmbal_fast.MMPareto({name: [each] for name, each in theta.items()}, gamma=gamma)
    one, other = torch.tensor(g1, device=device), torch.tensor(g2, device=device)
    pareto.backward(
        {
            "fused": theta["a"] @ one + theta["b"].sum(),
            "a": theta["a"] @ other,
            "b": theta["b"].sum(),
        }
    )
    pareto.step()
    assert theta["b"].grad is not None
    assert theta["b"].grad.tolist() == [2 * gamma] * len(g1)
    grad = theta["a"].grad
    assert grad is not None
    return grad


def test_worked_values(backend: Backend) -> None:
    found = combined([1.0, 0.0], [-1.0, 1.0], backend.device)
    assert found.tolist() == pytest.approx([0.670820, 1.341641], abs=1e-6)
    assert combined([1.0, 2.0], [1.0, 2.0], backend.device).tolist() == pytest.approx([3.0, 6.0])
    assert combined([2.0, 4.0], [0.0, 0.0], backend.device).tolist() == pytest.approx([3.0, 6.0])
    assert combined([0.0, 0.0], [0.0, 0.0], backend.device).tolist() == [0.0, 0.0]  # NaN there


# ---- the released step


def published_step(net: Net, number: int) -> None:
    batch, target = batch_of(number)
    features = net.features(batch)
    losses = {name: cross_entropy(net.heads[name](each), target) for name, each in features.items()}
    losses["fused"] = cross_entropy(net(features), target)
    encoders = {name: list(net.encoders[name].parameters()) for name in NAMES}
    every = [p for group in encoders.values() for p in group]
    grads: dict[str, dict[nn.Parameter, Tensor]] = {}
    for name, loss in losses.items():
        for parameter in every:
            parameter.grad = None
        loss.backward(retain_graph=True)
        grads[name] = {p: p.grad.clone() for p in every if p.grad is not None}
    for parameter in net.parameters():
        parameter.grad = None
    torch.stack(list(losses.values())).sum().backward()
    for name, group in encoders.items():
        published_pareto_(
            [p.grad for p in group if p.grad is not None],
            [grads["fused"][p] for p in group],
            [grads[name][p] for p in group],
        )


def our_backward(
    net: Any, pareto: Any, number: int, rows: slice = slice(None), **scaling: Any
) -> None:
    batch, target = batch_of(number)
    batch, target = {name: each[rows] for name, each in batch.items()}, target[rows]
    features = net.features(batch)
    losses = {
        name: cross_entropy(net.heads[name](each), target, reduction="sum") / 8
        for name, each in features.items()
    }
    losses["fused"] = cross_entropy(net(features), target, reduction="sum") / 8
    pareto.backward(losses, **scaling)


def test_equals_the_released_step_over_twenty_steps(backend: Backend) -> None:
    published, ours = filled(Net()), filled(Net())
    pareto = mmbal_fast.MMPareto(ours.encoders)  # type: ignore[arg-type]
    conflicts = 0
    nets = (published, ours)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
    for number in range(20):
        for optimizer in optimizers:
            optimizer.zero_grad()
        published_step(published, number)  # type: ignore[arg-type]
        our_backward(ours, pareto, number)
        conflicts += int((pareto.step().cosines <= 0).sum())
        for optimizer in optimizers:
            optimizer.step()
    assert 0 < conflicts < 60  # the run has seen both branches
    for one, other in zip(published.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_accumulated_batches_are_combined_once() -> None:
    whole, parts = filled(Net()), filled(Net())
    one, other = (mmbal_fast.MMPareto(net.encoders) for net in (whole, parts))  # type: ignore[arg-type]
    our_backward(whole, one, 3)
    for rows in (slice(0, 3), slice(3, 8)):
        our_backward(parts, other, 3, rows)
    one.step()
    other.step()
    for x, y in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-6)


def test_a_scaler_changes_nothing() -> None:
    grads = []
    for scaled in (False, True):
        net = filled(Net())
        pareto = mmbal_fast.MMPareto(net.encoders)  # type: ignore[arg-type]
        scaler = GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        our_backward(net, pareto, 1, grad_scaler=scaler)
        pareto.step(grad_scaler=scaler, optimizer=optimizer)
        grads.append([each.grad for each in net.parameters()])
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-7)


def test_frozen_encoders_and_parameters_that_the_own_loss_does_not_reach() -> None:
    net: Any = filled(Net())
    net.encoders["audio"].requires_grad_(False)
    net.encoders["text"][1].extra = nn.Linear(4, 4)  # no forward takes it
    pareto = mmbal_fast.MMPareto(net.encoders)
    our_backward(net, pareto, 0)
    pareto.step()
    assert all(each.grad is None for each in net.encoders["audio"].parameters())
    assert net.encoders["text"][1].extra.weight.grad is None
    assert all(each.grad is not None for each in net.encoders["image"].parameters())


def test_nothing_is_read_by_the_host(native: Backend) -> None:
    theta = {
        name: [nn.Parameter(torch.ones(3, device=native.device)) for _ in range(5)] for name in "ab"
    }
    pareto = mmbal_fast.MMPareto(theta)
    own = {name: torch.stack([each.sum() for each in group]).sum() for name, group in theta.items()}
    for _ in range(2):  # the first may copy to the device which gradient is whose
        pareto.backward({"fused": own["a"] - own["b"], **own})
        own = {
            name: torch.stack([each.sum() for each in group]).sum() for name, group in theta.items()
        }
        with host_reads() as found:
            pareto.step()
    assert found == []


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_is_one_operation_and_no_host_read(cpu: Backend, scaled: bool) -> None:
    """After the backward passes, where a scaler has unscaled, too; that is two launches.

    See test_launches of tests/functional/test_pareto.py.
    """
    net = filled(Net())
    pareto = mmbal_fast.MMPareto(net.encoders)  # type: ignore[arg-type]
    scaler = GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with cpu.running():
        our_backward(net, pareto, 0, grad_scaler=scaler)
        if scaled:
            scaler.unscale_(optimizer)
        counts = count(partial(pareto.step, grad_scaler=scaler, optimizer=optimizer))
    assert (counts.launches, counts.synchronisations) == (1, 0)
    assert counts.extra_bytes == 2 * len(NAMES) * 8  # the record


def test_own_gradients_that_are_one_tensor(backend: Backend) -> None:
    """Of a sum of parameters, accumulated over batches."""
    found = []
    for batches in (1, 2):
        x, y, z = (nn.Parameter(torch.ones(3, device=backend.device)) for _ in range(3))
        pareto = mmbal_fast.MMPareto({"a": [x, y], "b": [z]})
        for _ in range(batches):
            own = ((x + y + 1) ** 2).sum() / batches
            fused = (x.sum() - 2 * y.sum() + z.sum()) / batches
            pareto.backward({"fused": fused, "a": own, "b": z.sum() / batches})
        pareto.step()
        found.append(torch.stack([each.grad for each in (x, y, z) if each.grad is not None]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_encoder_whose_own_gradient_is_not_finite_keeps_the_sum(value: float) -> None:
    x, y = (nn.Parameter(torch.ones(3)) for _ in range(2))
    pareto = mmbal_fast.MMPareto({"a": [x], "b": [y]})
    pareto.backward({"fused": (x + y).sum(), "a": -x.sum(), "b": -2 * y.sum()})
    assert pareto._own is not None
    own = pareto._own[0]
    assert own is not None
    own[1] = value
    record = pareto.step()
    assert record.weights.isnan().tolist() == [True, False]
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0, 0.0]


def test_a_compiled_step(cpu: Backend) -> None:
    """``backward`` runs eagerly, as it must for autograd; the step is one graph."""
    torch._dynamo.reset()
    nets = [filled(Net()), filled(Net())]
    with cpu.running():
        for net, compiled in zip(nets, (False, True), strict=True):
            pareto = mmbal_fast.MMPareto(net.encoders)  # type: ignore[arg-type]
            step = pareto.step
            if compiled:
                step = torch.compile(step, fullgraph=True, backend="eager")
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
            for number in range(4):
                pareto.gamma = 1.0 + 0.1 * number
                optimizer.zero_grad()
                our_backward(net, pareto, number)
                step()
                optimizer.step()
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(one, other)


def test_bad_input() -> None:
    net: Any = filled(Net())
    pareto = mmbal_fast.MMPareto(net.encoders)
    with pytest.raises(RuntimeError, match=r"^MMPareto.step: needs backward\(\) first \(got none"):
        pareto.step()
    loss = next(net.parameters()).sum()
    with pytest.raises(ValueError, match=r"losses must be \['audio', 'fused', .*got \['fused'\]\)"):
        pareto.backward({"fused": loss})
    with pytest.raises(ValueError, match=r"scalars with a graph \(got shape \[2\].* for 'text'\)"):
        pareto.backward({"fused": loss, "audio": loss, "image": loss, "text": torch.zeros(2)})
