"""OGMGE against the published loop, and what a training script relies on.

Other places: test_ogm_ge_stack.py (scalers, wrappers, checkpoints), tests/distributed (many ranks).
"""

from __future__ import annotations

import copy
import gc
import math
import resource
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from mmbal_fast import OGMGE, _backend, functional
from mmbal_fast.functional import _checks
from mmbal_fast.nn import unimodal_logits
from tests.host_reads import host_reads
from tests.methods.published_loop import AudioVisual, published_step

if TYPE_CHECKING:
    from mmbal_fast import ModulationRecord
    from tests.conftest import Backend

NAN = math.nan


def convolutions(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 4


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def bits(model: nn.Module) -> list[Tensor]:
    """Everything that training changes."""
    return [x.detach().cpu().clone() for x in [*model.parameters(), *model.buffers()]]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# --- the published loop


def audio_visual_batch(step: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The label shows in one of the two, by turns, so that by turns they dominate."""
    generator = torch.Generator().manual_seed(step)
    label = torch.randint(4, (10,), generator=generator)
    audio = torch.randn(10, 1, 9, 9, generator=generator)
    visual = torch.randn(10, 3, 8, 8, generator=generator)
    telling = visual if step // 4 % 2 else audio
    telling += label.view(-1, 1, 1, 1)
    return audio.to(device), visual.to(device), label.to(device)


class Training:
    """A model, its optimizer, and one step of both with the gradients changed in between."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(1)
        self.device = device
        self.model = AudioVisual().to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def balancer(self, noise: float = 1.0) -> OGMGE:
        encoders = {"audio": self.model.audio_net, "visual": self.model.visual_net}
        return OGMGE(encoders, alpha=0.4, noise=noise, select=convolutions, seed=6)

    def step(self, number: int, change: Callable[[Tensor, Tensor, Tensor], Any]) -> Any:
        audio, visual, label = audio_visual_batch(number, self.device)
        self.optimizer.zero_grad()
        a, v, out = self.model(audio, visual)
        nn.functional.cross_entropy(out, label).backward()
        result = change(a.detach(), v.detach(), label)
        self.optimizer.step()
        return result

    def balanced(self, number: int, balancer: OGMGE) -> ModulationRecord:
        def change(a: Tensor, v: Tensor, label: Tensor) -> ModulationRecord:
            return balancer.step(
                unimodal_logits({"audio": a, "visual": v}, self.model.fusion), label
            )

        return self.step(number, change)


def test_equals_the_published_loop_without_noise(backend: Backend) -> None:
    published, ours = Training(backend.device), Training(backend.device)
    balancer = ours.balancer(noise=0.0)
    throttled = set()
    for number in range(8):
        expected = published.step(
            number,
            lambda a, v, label: published_step(
                published.model, a, v, label, alpha=0.4, modulation="OGM"
            ),
        )
        record = ours.balanced(number, balancer)
        scores, coefficients = record.scores.tolist(), record.coefficients.tolist()
        assert scores == pytest.approx([expected.score_a, expected.score_v], rel=1e-5)
        assert coefficients == pytest.approx([expected.coeff_a, expected.coeff_v], abs=1e-6)
        throttled.add(coefficients.index(min(coefficients)))
    assert throttled == {0, 1}  # the run has seen both branches
    for one, other in zip(bits(ours.model), bits(published.model), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_equals_the_published_loop_with_noise(backend: Backend) -> None:
    """The same coefficients; noise of the same deviation, and nowhere else."""
    published, ours, plain = (Training(backend.device) for _ in range(3))
    plain.step(0, lambda a, v, label: None)
    before = gradients(plain.model)
    expected = published.step(
        0,
        lambda a, v, label: published_step(
            published.model, a, v, label, alpha=0.4, modulation="OGM_GE"
        ),
    )
    record = ours.balanced(0, ours.balancer())
    coefficients = {"audio_net": expected.coeff_a, "visual_net": expected.coeff_v}
    assert record.coefficients.tolist() == pytest.approx(list(coefficients.values()), abs=1e-6)
    assert min(coefficients.values()) < 1
    for name, old in before.items():
        new, other = gradients(ours.model)[name], gradients(published.model)[name]
        if old.ndim != 4:
            assert torch.equal(new, old)
            assert torch.equal(other, old)
            continue
        k = coefficients[name.split(".")[0]]
        for changed in (new, other):  # the second proves the limits
            residual = (changed - k * old) / old.std()
            assert abs(residual.mean().item()) < 4 / old.numel() ** 0.5
            assert abs(residual.std().item() - 1) < 4 / (2 * old.numel()) ** 0.5
        assert (new - other).abs().max() > old.std()


# --- what a step computes


class Net(nn.Module):
    """Encoders for any number of modalities, with weights of two dimensions and biases."""

    def __init__(self, modalities: int = 2) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.encoders = nn.ModuleDict({f"m{i}": nn.Linear(5, 40) for i in range(modalities)})
        self.heads = nn.ModuleDict({name: nn.Linear(40, 3) for name in self.encoders})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {
            name: self.heads[name]((1 + i) * encoder(x).tanh())
            for i, (name, encoder) in enumerate(self.encoders.items())
        }


def weight(net: Net, name: str) -> nn.Parameter:
    return net.get_parameter(f"encoders.{name}.weight")


def weight_grad(net: Net, name: str) -> Tensor:
    grad = weight(net, name).grad
    assert grad is not None
    return grad


def net_on(backend: Backend, modalities: int = 2) -> Net:
    return Net(modalities).to(backend.device)


def batch(backend: Backend, step: int = 0, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 5, generator=generator)
    return x.to(backend.device), (x[:, 0] > 0).long().to(backend.device) + (x[:, 1] > 1).to(
        backend.device
    )


def backward(net: Net, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    logits = net(x)
    nn.functional.cross_entropy(sum(logits.values()), target, reduction="sum").backward()  # type: ignore[arg-type]
    return logits


@pytest.mark.parametrize("modalities", [2, 3, 8])
@pytest.mark.parametrize("rule", ["cvpr2022", "cvpr2022_excess", "tpami2024"])
def test_record_and_gradients(backend: Backend, modalities: int, rule: Any) -> None:
    net, (x, target) = net_on(backend, modalities), batch(backend)
    logits = backward(net, x, target)
    before = {name: grad.clone() for name, grad in gradients(net).items()}
    record = OGMGE(net.encoders, alpha=0.7, rule=rule, seed=9).step(logits, target)

    scores = functional.contribution_scores([logits[name] for name in net.encoders], target)
    ratios = functional.discrepancy_ratios(scores)
    k = functional.modulation_coefficients(ratios, 0.7, rule=rule)
    assert torch.equal(record.scores, scores)
    assert torch.equal(record.ratios, ratios)
    assert torch.equal(record.coefficients, k)
    assert (k < 1).any()
    assert not record.skipped
    for index, name in enumerate(net.encoders):
        weight = f"encoders.{name}.weight"
        z = functional.noise_like(
            before[weight], seed=9, step=0, tensor_id=zlib.crc32(f"{name}.weight".encode())
        )
        expected = k[index] * before[weight] + (before[weight].std() + 1e-8) * z
        torch.testing.assert_close(gradients(net)[weight], expected, rtol=1e-5, atol=1e-6)
    for name, grad in gradients(net).items():
        if "encoders" not in name or "bias" in name:
            assert torch.equal(grad, before[name])


def test_logits_in_any_order(backend: Backend) -> None:
    net, (x, target) = net_on(backend, 3), batch(backend)
    logits = backward(net, x, target)
    one = OGMGE(net.encoders, alpha=0.7).step(logits, target).clone()
    turned = dict(reversed(logits.items()))
    other = OGMGE(net.encoders, alpha=0.7).step(turned, target)
    assert torch.equal(one.scores, other.scores)


def test_record_is_overwritten_and_clones_stay(backend: Backend) -> None:
    net = net_on(backend)
    assert OGMGE(net.encoders, alpha=0.7).last is None
    balancer = OGMGE(net.encoders, alpha=0.7)
    records, copies = [], []
    for number in range(2):
        x, target = batch(backend, number)
        records.append(balancer.step(backward(net, x, target), target))
        copies.append(records[-1].clone())
    assert balancer.last is records[1]
    assert torch.equal(records[0].scores, copies[1].scores)
    assert not torch.equal(copies[0].scores, copies[1].scores)
    last = records[1]
    assert not any(x.requires_grad for x in (last.scores, last.ratios, last.coefficients))


def test_soft_labels_and_ignored_samples(backend: Backend) -> None:
    net, (x, target) = net_on(backend), batch(backend)
    logits = backward(net, x, target)
    hard = OGMGE(net.encoders, alpha=0.7).step(logits, target).clone()
    soft = nn.functional.one_hot(target, 3).float()
    record = OGMGE(net.encoders, alpha=0.7).step(logits, soft)
    torch.testing.assert_close(record.scores, hard.scores)
    some = target.clone()
    some[3:] = 7
    ignoring = OGMGE(net.encoders, alpha=0.7).step(logits, some, ignore_index=7).clone()
    three = {name: each[:3] for name, each in logits.items()}
    record = OGMGE(net.encoders, alpha=0.7).step(three, target[:3])
    torch.testing.assert_close(record.scores, ignoring.scores)


@pytest.mark.parametrize("labels", ["empty", "ignored"])
def test_no_sample_throttles_nothing(backend: Backend, labels: str) -> None:
    net, (x, target) = net_on(backend), batch(backend)
    logits = backward(net, x, target)
    before = [grad.clone() for grad in gradients(net).values()]
    if labels == "empty":
        logits, target = {name: each[:0] for name, each in logits.items()}, target[:0]
    else:
        target = torch.full_like(target, -100)
    record = OGMGE(net.encoders, alpha=0.7, noise=0.0).step(logits, target)
    assert record.scores.tolist() == [0.0, 0.0]
    assert record.ratios.isnan().all()
    assert record.coefficients.tolist() == [1.0, 1.0]
    assert same(list(gradients(net).values()), before)


def test_callable_rule(backend: Backend) -> None:
    net, (x, target) = net_on(backend), batch(backend)
    logits = backward(net, x, target)
    before = weight_grad(net, "m1").clone()
    seen = []

    def rule(ratios: Tensor) -> Tensor:
        seen.append(ratios.clone())
        return torch.full_like(ratios, 0.25)

    record = OGMGE(net.encoders, alpha=0.7, noise=0.0, rule=rule).step(logits, target)
    assert torch.equal(seen[0], record.ratios)
    assert record.coefficients.tolist() == [0.25, 0.25]
    assert torch.equal(weight_grad(net, "m1"), 0.25 * before)


# --- accumulation


def test_accumulated_batches_are_modulated_once(backend: Backend) -> None:
    """Three uneven micro-batches give what their union gives, with the same noise."""
    whole, parts = net_on(backend), net_on(backend)
    x, target = batch(backend)
    one, other = (OGMGE(net.encoders, alpha=0.7, seed=4) for net in (whole, parts))
    expected = one.step(backward(whole, x, target), target)
    for piece in (slice(0, 2), slice(2, 9), slice(9, 12)):
        other.observe(backward(parts, x[piece], target[piece]), target[piece])
    record = other.step()
    torch.testing.assert_close(record.scores, expected.scores)
    torch.testing.assert_close(record.coefficients, expected.coefficients)
    assert record.coefficients.min() < 0.9
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], grad, rtol=1e-4, atol=1e-5)


def test_each_step_starts_a_new_sum(backend: Backend) -> None:
    net, (x, target) = net_on(backend), batch(backend)
    balancer = OGMGE(net.encoders, alpha=0.7)
    logits = backward(net, x, target)
    first = balancer.step(logits, target).scores.clone()
    assert torch.equal(balancer.step(logits, target).scores, first)
    balancer.observe(logits, target)
    assert torch.equal(balancer.step(logits, target).scores, 2 * first)
    for _ in range(3):
        balancer.observe(logits, target)
    torch.testing.assert_close(balancer.step().scores, 3 * first)


def test_a_step_needs_scores(backend: Backend) -> None:
    net, (x, target) = net_on(backend), batch(backend)
    balancer = OGMGE(net.encoders, alpha=0.7)
    logits = backward(net, x, target)
    before = [grad.clone() for grad in gradients(net).values()]
    with pytest.raises(RuntimeError, match=r"^OGMGE.step: needs scores, .*\(got none since"):
        balancer.step()
    for half in ({"logits": logits}, {"target": target}):
        with pytest.raises(ValueError, match=r"^OGMGE.step: logits and target must be given toge"):
            balancer.step(**half)
    assert same(list(gradients(net).values()), before)
    balancer.step(logits, target)
    with pytest.raises(RuntimeError, match="needs scores"):
        balancer.step()


# --- noise from step to step, resuming, enabled


def run(
    net: Net, balancer: OGMGE, backend: Backend, steps: range, optimizer: torch.optim.Optimizer
) -> None:
    for number in steps:
        x, target = batch(backend, number)
        optimizer.zero_grad()
        balancer.step(backward(net, x, target), target)
        optimizer.step()


def test_resumes_bit_for_bit(backend: Backend) -> None:
    straight = net_on(backend)
    balancer = OGMGE(straight.encoders, alpha=0.7, seed=2**63 + 5)
    optimizer = torch.optim.Adam(straight.parameters())
    run(straight, balancer, backend, range(3), optimizer)
    saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict(), balancer.state_dict()))
    assert saved[2] == {"names": ["m0", "m1"], "seed": 2**63 + 5, "step": 3, "enabled": True}
    run(straight, balancer, backend, range(3, 6), optimizer)

    resumed = net_on(backend)
    again = OGMGE(resumed.encoders, alpha=0.7)
    optimizer = torch.optim.Adam(resumed.parameters())
    torch.rand(7)  # no generator of torch plays a part
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    run(resumed, again, backend, range(3, 6), optimizer)
    assert same(bits(resumed), bits(straight))

    unseeded = net_on(backend)  # without the balancer's state it differs: the test can fail
    optimizer = torch.optim.Adam(unseeded.parameters())
    unseeded.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run(unseeded, OGMGE(unseeded.encoders, alpha=0.7), backend, range(3, 6), optimizer)
    assert not same(bits(unseeded), bits(straight))


def test_state_dict_is_checked(backend: Backend) -> None:
    balancer = OGMGE(net_on(backend).encoders, alpha=0.7)
    with pytest.raises(
        ValueError,
        match=r"^OGMGE.load_state_dict: state must have the keys enabled, names, seed, step \(got",
    ):
        balancer.load_state_dict({"seed": 1})
    names = {"names": ["m0", "m1"]}
    with pytest.raises(ValueError, match=r"^OGMGE.load_state_dict: seed must be from 0 to "):
        balancer.load_state_dict(names | {"seed": 2**64, "step": 1, "enabled": True})
    later = names | {"seed": 1, "step": 2**40, "enabled": False}
    balancer.load_state_dict(later)
    assert balancer.state_dict() == later
    assert not balancer.enabled


def residuals(backend: Backend, seed: int, steps: int) -> list[Tensor]:
    net, (x, target) = net_on(backend), batch(backend)
    balancer = OGMGE(net.encoders, alpha=0.0, seed=seed)
    found = []
    for _ in range(steps):
        net.zero_grad()
        logits = backward(net, x, target)
        before = {name: grad.clone() for name, grad in gradients(net).items()}
        balancer.step(logits, target)
        for name in ("encoders.m0.weight", "encoders.m1.weight"):
            grad = gradients(net)[name]
            found.append((grad - before[name]) / before[name].std())
    return found


def test_noise_differs_between_steps_parameters_and_seeds(backend: Backend) -> None:
    all_of_them = residuals(backend, 0, 3) + residuals(backend, 1, 3)
    for i, one in enumerate(all_of_them):
        for other in all_of_them[:i]:
            assert (one - other).abs().max() > 0.5
    again = residuals(backend, 0, 3)
    assert same(all_of_them[:6], again)


def test_noise_depends_on_names_alone(backend: Backend) -> None:
    """Neither on the order of parameters, nor on what else is modulated, nor on frozen layers."""
    x, target = batch(backend)
    found = []
    for kind in range(4):
        net = net_on(backend, 3)
        encoders = dict(net.encoders.items())
        if kind == 1:
            encoders = dict(reversed(encoders.items()))
        if kind == 2:
            weight(net, "m0").requires_grad_(False)
        select = (lambda name, p: True) if kind == 3 else None
        balancer = OGMGE(encoders, alpha=0.7, select=select)  # type: ignore[arg-type]
        balancer.step(backward(net, x, target), target)
        found.append(weight_grad(net, "m2"))
    assert same(found[1:], found[:1] * 3)


def test_generators_of_torch_are_left_alone(backend: Backend) -> None:
    net, (x, target) = net_on(backend), batch(backend)
    logits = backward(net, x, target)
    before = torch.get_rng_state()
    OGMGE(net.encoders, alpha=0.7).step(logits, target)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rule", ["cvpr2022", lambda ratios: 0.5 * ratios])
def test_disabled(backend: Backend, rule: Any) -> None:
    net, (x, target) = net_on(backend), batch(backend)
    logits = backward(net, x, target)
    before = [grad.clone() for grad in gradients(net).values()]
    balancer = OGMGE(net.encoders, alpha=0.7, rule=rule)
    balancer.enabled = False
    record = balancer.step(logits, target)
    assert same(list(gradients(net).values()), before)
    assert record.coefficients.tolist() == [1.0, 1.0]
    assert record.scores.min() > 0
    assert record.ratios.max() > 1
    state = balancer.state_dict()
    assert (state["step"], state["enabled"]) == (0, False)
    balancer.enabled = True
    assert balancer.step(logits, target).coefficients.min() < 1
    assert balancer.state_dict()["step"] == 1


@pytest.mark.parametrize("rule", ["cvpr2022", lambda ratios: 0.5 * ratios])
def test_enabled_counts_when_the_step_is_made(backend: Backend, rule: Any) -> None:
    net, (x, target) = net_on(backend), batch(backend)
    logits = backward(net, x, target)
    balancer = OGMGE(net.encoders, alpha=0.7, rule=rule)
    balancer.observe(logits, target)
    balancer.enabled = False
    assert balancer.step().coefficients.tolist() == [1.0, 1.0]
    balancer.observe(logits, target)
    balancer.enabled = True
    assert balancer.step().coefficients.min() < 1


# --- which parameters


def changed(net: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, grad in gradients(net).items() if not torch.equal(grad, before[name])}


def changed_by(net: Net, backend: Backend, encoders: Any, **options: Any) -> set[str]:
    x, target = batch(backend)
    net.zero_grad()
    logits = backward(net, x, target)
    before = {name: grad.clone() for name, grad in gradients(net).items()}
    OGMGE(encoders, alpha=0.7, **options).step(logits, target)
    return changed(net, before)


def test_modules_parameters_and_named_parameters(backend: Backend) -> None:
    net = net_on(backend)
    m0, m1 = net.encoders["m0"], net.encoders["m1"]
    weights = {"encoders.m0.weight", "encoders.m1.weight"}
    for first in (
        m0,
        list(m0.parameters()),
        m0.parameters(),
        m0.named_parameters(),
        m0.weight,
        nn.ParameterList(m0.parameters()),
    ):
        assert changed_by(net, backend, {"m0": first, "m1": m1}) == weights
    assert changed_by(net, backend, net.encoders) == weights


def test_names_of_parameters(backend: Backend) -> None:
    net = net_on(backend)
    m0, m1 = net.encoders["m0"], net.encoders["m1"]
    seen: list[str] = []
    OGMGE(
        {"m0": m0.named_parameters("a.b"), "m1": m1.parameters()},
        alpha=0.7,
        select=lambda name, parameter: not seen.append(name),  # type: ignore[func-returns-value]
    )
    assert seen == ["a.b.weight", "a.b.bias", "0", "1"]


def test_select(backend: Backend) -> None:
    net = net_on(backend)
    assert changed_by(net, backend, net.encoders, select=lambda name, p: "bias" in name) == {
        "encoders.m0.bias",
        "encoders.m1.bias",
    }
    everything = changed_by(net, backend, net.encoders, select=lambda name, p: True)
    assert everything == {name for name in gradients(net) if "encoders" in name}
    with pytest.raises(
        ValueError,
        match=r"^OGMGE: every modality must have a parameter that is selected \(got none for 'm0'",
    ):
        OGMGE(net.encoders, alpha=0.7, select=convolutions)


def test_names_keep_their_order(backend: Backend) -> None:
    net = net_on(backend, 3)
    encoders = {name: net.encoders[name] for name in ("m2", "m0", "m1")}
    balancer = OGMGE(encoders, alpha=0.7)
    assert balancer.names == ("m2", "m0", "m1")
    x, target = batch(backend)
    logits = backward(net, x, target)
    scores = functional.contribution_scores([logits[name] for name in encoders], target)
    assert torch.equal(balancer.step(logits, target).scores, scores)
    assert repr(balancer) == (
        "OGMGE(m2, m0, m1; 3 parameters, noise=1.0, alpha=0.7, rule='cvpr2022')"
    )


@pytest.mark.parametrize("how", ["module", "parameters"])
def test_weights_tied_within_a_modality_are_modulated_once(backend: Backend, how: str) -> None:
    net, alone = net_on(backend), net_on(backend)
    tied = nn.ModuleList([net.encoders["m0"], net.encoders["m0"], nn.Identity()])
    tied[2].weight = weight(net, "m0")
    encoder: Any = tied if how == "module" else [weight(net, "m0")] * 2
    x, target = batch(backend)
    balancer = OGMGE({"m0": encoder, "m1": net.encoders["m1"]}, alpha=0.7, noise=0.0)
    balancer.step(backward(net, x, target), target)
    OGMGE(alone.encoders, alpha=0.7, noise=0.0).step(backward(alone, x, target), target)
    assert same(list(gradients(net).values()), list(gradients(alone).values()))


def test_frozen_and_unused_parameters_are_left_alone(backend: Backend) -> None:
    net = net_on(backend)
    weight(net, "m0").requires_grad_(False)
    net.encoders["m1"].unused = nn.Linear(3, 3).to(backend.device)
    assert changed_by(net, backend, net.encoders) == {"encoders.m1.weight"}
    stale = torch.ones_like(weight(net, "m0"))
    weight(net, "m0").grad = stale.clone()
    x, target = batch(backend)
    OGMGE(net.encoders, alpha=0.7).step(backward(net, x, target), target)
    assert torch.equal(weight_grad(net, "m0"), stale)


def test_a_step_before_backward_is_refused(backend: Backend) -> None:
    net, (x, target) = net_on(backend), batch(backend)
    with torch.no_grad():
        logits = net(x)
    balancer = OGMGE(net.encoders, alpha=0.7)
    with pytest.raises(
        RuntimeError,
        match=r"^OGMGE.step: must come between backward and zero_grad \(got no gradient on 2 para",
    ):
        balancer.step(logits, target)
    assert balancer.state_dict()["step"] == 0


def test_wholly_frozen_encoders_have_no_gradient_to_miss(backend: Backend) -> None:
    net, (x, target) = net_on(backend), batch(backend)
    net.encoders.requires_grad_(False)
    balancer = OGMGE(net.encoders, alpha=0.7)
    assert balancer.step(backward(net, x, target), target).coefficients.min() < 1
    assert balancer.state_dict()["step"] == 1


def test_parameters_of_several_types(backend: Backend) -> None:
    net = net_on(backend)
    net.encoders["m0"].half()
    net.encoders["m1"].double()
    x, target = batch(backend)
    logits = {
        name: net.heads[name](encoder(x.to(weight(net, name).dtype)).float())
        for name, encoder in net.encoders.items()
    }
    nn.functional.cross_entropy(sum(logits.values()), target).backward()  # type: ignore[arg-type]
    before = {name: grad.clone() for name, grad in gradients(net).items()}
    OGMGE(net.encoders, alpha=0.7).step(logits, target)
    assert changed(net, before) == {"encoders.m0.weight", "encoders.m1.weight"}
    assert all(grad.isfinite().all() for grad in gradients(net).values())


def test_gradients_in_channels_last(backend: Backend) -> None:
    ours, other = Training(backend.device), Training(backend.device)
    ours.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    balancers = ours.balancer(noise=0.0), other.balancer(noise=0.0)
    for training, balancer in zip((ours, other), balancers, strict=True):
        training.balanced(0, balancer)
    grad = gradients(ours.model)["visual_net.0.weight"]
    assert grad.is_contiguous(memory_format=torch.channels_last)
    for one, two in zip(bits(ours.model), bits(other.model), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


# --- nothing is read by the host, nothing grows


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("rule", ["cvpr2022", lambda ratios: 1 / ratios.clamp(min=1)])
def test_no_host_read_in_a_step(
    backend: Backend, soft: bool, rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_checks, "_distributions", lambda *each: None)  # reads the CPU's alone
    if backend.native is None and not soft:
        pytest.skip("labels on the CPU are checked at once")
    net, (x, target) = net_on(backend, 3), batch(backend)
    logits = backward(net, x, target)
    layouts = {"m0": torch.randn(40, 10)[:, ::2], "m1": torch.randn(5, 40).t()}
    for name, grad in layouts.items():
        weight(net, name).grad = grad.to(backend.device)
    labels = nn.functional.one_hot(target, 3).float() if soft else target
    balancer = OGMGE(net.encoders, alpha=0.7, rule=rule)
    balancer.step(logits, labels)  # the first may move its buffers to the device
    with host_reads() as found:
        balancer.observe(logits, labels)
        balancer.observe(logits, labels)
        balancer.step()
        balancer.step(logits, labels)
        balancer.enabled = False
        balancer.step(logits, labels)
    assert found == []


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_steps_leave_nothing_behind(native: Backend) -> None:
    net, (x, target) = net_on(native, 3), batch(native)
    logits = {name: each.detach() for name, each in backward(net, x, target).items()}
    balancer = OGMGE(net.encoders, alpha=0.7)
    grads = [p.grad for p in net.encoders.parameters() if p.grad is not None]
    watched = [*grads, *logits.values(), target, balancer._rows, balancer._counter]

    def steps(count: int) -> None:
        for _ in range(count):
            balancer.step(logits, target)

    steps(20)
    gc.collect()
    workspaces = {key: each.data_ptr() for key, each in _backend._kept.workspaces.items()}
    counts, objects = [sys.getrefcount(each) for each in watched], len(gc.get_objects())
    tracemalloc.start()
    steps(20)
    grown = []
    for _ in range(3):  # what leaks grows every time, what is kept once does not
        gc.collect()
        traced = tracemalloc.get_traced_memory()[0]
        steps(80)
        gc.collect()
        grown.append(tracemalloc.get_traced_memory()[0] - traced)
    tracemalloc.stop()
    assert [sys.getrefcount(each) for each in watched] == counts
    assert len(gc.get_objects()) <= objects + 5
    assert min(grown) < 8000  # 80 steps
    assert {key: each.data_ptr() for key, each in _backend._kept.workspaces.items()} == workspaces
    resident = [resident_bytes()]
    for _ in range(3):
        steps(10 if native.emulated else 100)
        resident.append(resident_bytes())
    assert min(after - before for before, after in pairwise(resident)) < 1 << 20


def test_no_allocation_on_the_device(native: Backend) -> None:
    if native.name != "cuda":
        pytest.skip("needs a GPU")
    net, (x, target) = net_on(native), batch(native)
    logits = {name: each.detach() for name, each in backward(net, x, target).items()}
    balancer = OGMGE(net.encoders, alpha=0.7)
    for _ in range(3):
        balancer.step(logits, target)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        balancer.step(logits, target)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_replayed_graph_gets_fresh_noise(native: Backend) -> None:
    if native.name != "cuda":
        pytest.skip("needs a GPU")
    eager, captured = net_on(native), net_on(native)
    x, target = batch(native)
    nets = (eager, captured)
    logits = [
        {name: each.detach() for name, each in backward(net, x, target).items()} for net in nets
    ]
    start = [grad.clone() for grad in gradients(eager).values()]
    balancers = [OGMGE(net.encoders, alpha=0.7) for net in nets]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        balancers[1].step(logits[1], target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        balancers[1].step(logits[1], target)
    balancers[0].step(logits[0], target)
    for _ in range(3):
        for net in nets:
            for grad, old in zip(gradients(net).values(), start, strict=True):
                grad.copy_(old)
        balancers[0].step(logits[0], target)
        graph.replay()
        assert same(list(gradients(captured).values()), list(gradients(eager).values()))
    assert balancers[1].state_dict()["step"] == 4


# --- bad input


def test_arguments_of_other_kinds() -> None:
    encoders = {name: nn.Linear(2, 2) for name in ("a", "b")}
    for options, message in (
        ({"alpha": "0.3"}, r"^OGMGE: alpha must be a number \(got '0.3'\)$"),
        ({"alpha": 0.3, "seed": 1.5}, r"^OGMGE: seed must be an integer \(got 1.5\)$"),
    ):
        with pytest.raises(TypeError, match=message):
            OGMGE(encoders, **options)
    listed: Any = list(encoders.values())
    with pytest.raises(TypeError, match=r"^OGMGE: modalities must be a mapping .* \(got list\)$"):
        OGMGE(listed, alpha=0.3)
    logits: Any = [torch.zeros(1, 2)] * 2
    with pytest.raises(TypeError, match=r"^OGMGE.observe: logits must be a mapping .*got list\)$"):
        OGMGE(encoders, alpha=0.3).step(logits, torch.zeros(1).long())


def test_fewer_than_two_modalities() -> None:
    lonely: dict[str, nn.Module] = {"m0": nn.Linear(2, 2)}
    for encoders in ({}, lonely):
        names = ", ".join(repr(name) for name in encoders)
        with pytest.raises(
            ValueError, match=rf"^OGMGE: modalities must be at least two \(got \[{names}\]\)$"
        ):
            OGMGE(encoders, alpha=0.7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, r"alpha must be a number from 0 on \(got -0.1\)"),
        ({"alpha": NAN}, r"alpha must be a number from 0 on \(got nan\)"),
        ({"alpha": math.inf}, r"alpha must be a number from 0 on \(got inf\)"),
        ({"noise": -1.0}, r"noise must be a number from 0 on \(got -1.0\)"),
        ({"noise": NAN}, r"noise must be a number from 0 on \(got nan\)"),
        ({"rule": "cvpr2023"}, r"rule must be one of cvpr2022, .*\(got 'cvpr2023'\)"),
        ({"seed": 2**64}, r"seed must be from 0 to 2\^64 - 1 \(got 18446744073709551616\)"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^OGMGE: {message}$"):
        OGMGE(Net().encoders, **{"alpha": 0.7} | options)


def test_parameter_in_two_modalities() -> None:
    net = Net()
    net.encoders["m1"].extra = nn.Module()
    net.encoders["m1"].extra.shared = weight(net, "m0")
    with pytest.raises(
        ValueError,
        match=r"^OGMGE: a parameter must belong to one modality "
        r"\(got 'm0.weight' also as 'm1.extra.shared'\)$",
    ):
        OGMGE(net.encoders, alpha=0.7)


def test_modality_without_parameters() -> None:
    empty = r"^OGMGE: every modality must have a parameter that is selected \(got none for 'm1'"
    lacking: list[Any] = [nn.ReLU(), [], nn.LayerNorm(4)]
    for encoder in lacking:
        with pytest.raises(ValueError, match=empty):
            OGMGE({"m0": nn.Linear(2, 2), "m1": encoder}, alpha=0.7)
    with pytest.raises(
        TypeError,
        match=r"^OGMGE: modality 'm1' must be a module, parameters or named parameters "
        r"\(got str in it\)$",
    ):
        OGMGE({"m0": nn.Linear(2, 2), "m1": ["encoder.weight"]}, alpha=0.7)  # type: ignore[dict-item]
    wrong: Any
    for wrong in (None, "encoder", 3):
        with pytest.raises(
            TypeError,
            match=rf"^OGMGE: modality 'm1' must be a module, .* parameters \(got {wrong!r}\)$",
        ):
            OGMGE({"m0": nn.Linear(2, 2), "m1": wrong}, alpha=0.7)


@contextmanager
def nothing_written(net: Net, balancer: OGMGE) -> Iterator[None]:
    before = {
        name: grad.clone()
        for name, grad in gradients(net).items()
        if grad.layout == torch.strided and not grad.is_meta
    }
    state = balancer.state_dict()
    yield
    after = gradients(net)
    assert all(torch.equal(after[name], grad) for name, grad in before.items())
    assert balancer.state_dict() == state


def test_names_of_modalities(backend: Backend) -> None:
    net, (x, target) = net_on(backend), batch(backend)
    logits = backward(net, x, target)
    balancer = OGMGE(net.encoders, alpha=0.7)
    for wrong in (
        {"m0": logits["m0"]},
        {"m0": logits["m0"], "M1": logits["m1"]},
        logits | {"m2": logits["m0"]},
        {},
    ):
        names = ", ".join(repr(name) for name in wrong)
        with (
            nothing_written(net, balancer),
            pytest.raises(
                ValueError,
                match=r"^OGMGE.observe: logits must be given for \['m0', 'm1'\] "
                rf"\(got \[{names}\]\)$",
            ),
        ):
            balancer.step(wrong, target)


def test_shapes_of_logits(backend: Backend) -> None:
    net, (x, target) = net_on(backend), batch(backend)
    logits = backward(net, x, target)
    balancer = OGMGE(net.encoders, alpha=0.7)
    with (
        nothing_written(net, balancer),
        pytest.raises(ValueError, match=r"^OGMGE.observe: logits must .*\[\[12, 3\], \[5, 3\]\]\)"),
    ):
        balancer.step(logits | {"m1": logits["m1"][:5]}, target)
    with (
        nothing_written(net, balancer),
        pytest.raises(
            ValueError, match=r"^OGMGE.observe: target must .*\[12\] .*\(got \[5\], torch.int64\)$"
        ),
    ):
        balancer.step(logits, target[:5])
    with pytest.raises(RuntimeError, match="needs scores"):  # neither left a score behind
        balancer.step()


@pytest.mark.parametrize("kind", ["sparse", "complex", "meta", "expanded"])
def test_gradients_that_cannot_be_modulated(backend: Backend, kind: str) -> None:
    """Named as the parameter is; the others stay as they were."""
    net, (x, target) = net_on(backend), batch(backend)
    logits = backward(net, x, target)
    on = backend.device
    odd = nn.Parameter(torch.randn(4, 3, device=on))
    if kind == "sparse":
        odd.grad = torch.eye(4, 3, device=on).to_sparse()
    elif kind == "complex":
        odd = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64, device=on))
        odd.grad = torch.ones_like(odd)
    elif kind == "meta":
        odd = nn.Parameter(torch.randn(4, 3, device="meta"))
        odd.grad = torch.ones_like(odd)
    else:
        odd.grad = torch.ones(1, 3, device=on).expand(4, 3)
    net.encoders["m1"].odd = odd
    balancer = OGMGE(net.encoders, alpha=0.7)
    error = RuntimeError if kind == "expanded" else TypeError
    message = r"^modulate_: gradient 'm1.odd' must "
    for noise in (0.0, 1.0):
        balancer.noise = noise
        with nothing_written(net, balancer), pytest.raises(error, match=message):
            balancer.step(logits, target)
    odd.grad = None  # and then it goes on, with the scores of its own batch alone
    expected = functional.contribution_scores(list(logits.values()), target)
    assert torch.equal(balancer.step(logits, target).scores, expected)


def test_logits_elsewhere_than_gradients(backend: Backend) -> None:
    if backend.name != "cuda":
        pytest.skip("needs a GPU")
    net, (x, target) = net_on(backend), batch(backend)
    logits = {name: each.cpu() for name, each in backward(net, x, target).items()}
    balancer = OGMGE(net.encoders, alpha=0.7)
    with (
        nothing_written(net, balancer),
        pytest.raises(ValueError, match=r"\(got cpu and cuda:0\)"),
    ):
        balancer.step(logits, target.cpu())
    with pytest.raises(ValueError, match=r"\(got cuda:0 and cpu\)|\(got cpu and cuda:0\)"):
        balancer.step(logits, target)


def test_label_out_of_range(backend: Backend) -> None:
    net, (x, target) = net_on(backend), batch(backend)
    logits = backward(net, x, target)
    wrong = target.clone()
    wrong[5] = 3
    balancer = OGMGE(net.encoders, alpha=0.7)
    if not backend.cuda_kernels:
        with (
            nothing_written(net, balancer),
            pytest.raises(IndexError, match=r"target must be in \[0, 3\).*\(got 3 at 5\)$"),
        ):
            balancer.step(logits, wrong)
        balancer.check()
        return
    balancer.step(logits, wrong)
    with pytest.raises(IndexError, match=r"^OGMGE: target must be in \[0, C\) or ignore_index"):
        balancer.check()
    balancer.check()  # reported once
    balancer.step(logits, wrong)
    with pytest.raises(IndexError, match=r"^OGMGE: target must be in"):
        balancer.step(logits, target, error_if_nonfinite=True)


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_nonfinite_gradients(backend: Backend, noise: float, bad: float) -> None:
    net, twin, (x, target) = net_on(backend), net_on(backend), batch(backend)
    logits = backward(net, x, target)
    backward(twin, x, target)
    balancer, other = (OGMGE(each.encoders, alpha=0.7, noise=noise) for each in (net, twin))
    other.step(logits, target)
    broken, fine = weight_grad(net, "m0"), weight_grad(net, "m1")
    before = broken.clone()
    broken[3, 2] = bad

    with (
        nothing_written(twin, other),
        nothing_written_bits(net),
        pytest.raises(
            RuntimeError,
            match=r"^OGMGE.step: gradients must be finite \(got NaN or inf in "
            r"gradient 'm0.weight'\)$",
        ),
    ):
        balancer.step(logits, target, error_if_nonfinite=True)
    record = balancer.step(logits, target)
    torch.testing.assert_close(broken[:3], record.coefficients[0] * before[:3], rtol=1e-6, atol=0)
    assert not broken[3, 2].isfinite()
    assert torch.equal(fine, weight_grad(twin, "m1"))
    assert torch.equal(record.scores, other.last.scores)  # those of the failed step are forgotten
    with pytest.raises(RuntimeError, match=r"^OGMGE: gradients must be finite"):
        balancer.check()
    balancer.check()
    broken[3, 2] = 1.0
    balancer.step(logits, target, error_if_nonfinite=True)
    balancer.check()


@contextmanager
def nothing_written_bits(net: Net) -> Iterator[None]:
    before = {name: grad.view(torch.int32).clone() for name, grad in gradients(net).items()}
    yield
    after = gradients(net)
    assert all(torch.equal(after[name].view(torch.int32), x) for name, x in before.items())
