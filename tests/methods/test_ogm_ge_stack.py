"""OGMGE in training stacks of one process; tests/distributed has those of many."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode

import mmbal_fast
from mmbal_fast.functional._modulate import NON_FINITE_GRADIENT, unscales
from mmbal_fast.training import gradients
from tests.defaults import default
from tests.host_reads import host_reads
from tests.methods.checkpoints import SAVES

if TYPE_CHECKING:
    from tests.conftest import Backend

Logits = dict[str, Tensor]
SCALE = 2.0**10  # a power of two: scaling and unscaling are exact


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these small networks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.audio = nn.Sequential(nn.Linear(6, 90), nn.ReLU(), nn.Linear(90, 5))
        self.image = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))
        self.head = nn.Linear(10, 3)

    def forward(self, batch: Logits) -> tuple[Tensor, Logits]:
        features = {"audio": self.audio(batch["audio"]), "image": self.image(batch["image"])}
        fused = self.head(torch.cat(list(features.values()), dim=1))
        return fused, mmbal_fast.nn.unimodal_logits(features, self.head)

    def balancer(self, **options: Any) -> mmbal_fast.OGMGE:
        encoders = {"audio": self.audio, "image": self.image}
        return mmbal_fast.OGMGE(encoders, **{"alpha": 0.5, "seed": 3} | options)

    def bits(self) -> Tensor:
        return torch.cat([each.detach().double().flatten() for each in self.parameters()])


def batch_of(step: int, size: int = 8) -> tuple[Logits, Tensor]:
    generator = torch.Generator().manual_seed(step)
    target = torch.randint(3, (size,), generator=generator)
    audio = torch.randn(size, 6, generator=generator)
    audio[:, 0] += 3.0 * target
    image = torch.randn(size, 2, 4, 4, generator=generator)
    return {"audio": audio, "image": image}, target


def backward(net: nn.Module, step: int, scaler: GradScaler | None = None) -> tuple[Logits, Tensor]:
    device = next(net.parameters()).device
    batch, target = batch_of(step)
    target = target.to(device)
    fused, logits = net({name: each.to(device) for name, each in batch.items()})
    loss = nn.functional.cross_entropy(fused, target)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return logits, target


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def train(
    net: Net,
    balancer: mmbal_fast.OGMGE,
    steps: range,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    set_to_none: bool = True,
) -> None:
    optimizer = optimizer or sgd(net)
    for step in steps:
        optimizer.zero_grad(set_to_none=set_to_none)
        balancer.step(*backward(net, step))
        optimizer.step()


# ---------------------------------------------------------------------------- gradient scaling


@pytest.fixture(params=["fused", "by the scaler", "before the step"])
def unscaling(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """The ways to unscale: a callable that comes before the step."""
    if request.param != "fused":
        monkeypatch.setattr(gradients, "unscales", lambda device: False)

    def before(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> None:
        if request.param == "before the step":
            scaler.unscale_(optimizer)

    return before


Unscale = Callable[[GradScaler, torch.optim.Optimizer], None]


def scaled_step(
    net: Net,
    balancer: mmbal_fast.OGMGE,
    scaler: GradScaler,
    optimizer: torch.optim.Optimizer,
    step: int,
    unscale: Unscale = lambda scaler, optimizer: None,
    spoil: Callable[[], None] = lambda: None,
) -> mmbal_fast.ModulationRecord:
    optimizer.zero_grad()
    logits, target = backward(net, step, scaler)
    spoil()
    unscale(scaler, optimizer)
    record = balancer.step(logits, target, grad_scaler=scaler, optimizer=optimizer)
    scaler.step(optimizer)
    scaler.update()
    return record


@pytest.mark.in_one_launch
@pytest.mark.parametrize("noise", [1.0, 0.0])
@pytest.mark.parametrize("fused_optimizer", [False, True])
def test_training_with_a_scaler_equals_training_without(
    native: Backend, unscaling: Unscale, noise: float, fused_optimizer: bool
) -> None:
    def adam(net: Net) -> torch.optim.Optimizer:
        return torch.optim.Adam(net.parameters(), lr=0.01, fused=fused_optimizer)

    plain, scaled = Net().to(native.device), Net().to(native.device)
    train(plain, plain.balancer(noise=noise), range(5), adam(plain))
    balancer, optimizer = scaled.balancer(noise=noise), adam(scaled)
    scaler = GradScaler(native.device.type, init_scale=SCALE, growth_interval=2)
    for step in range(5):
        record = scaled_step(scaled, balancer, scaler, optimizer, step, unscaling)
        assert not record.skipped
    assert torch.equal(plain.bits(), scaled.bits())
    assert balancer.state_dict()["step"] == 5
    assert scaler.get_scale() == 4 * SCALE


@pytest.mark.in_one_launch
@pytest.mark.parametrize("noise", [1.0, 0.0])
def test_steps_that_the_scaler_skips_leave_no_trace(
    native: Backend, unscaling: Unscale, noise: float
) -> None:
    """An inf in each gradient in turn, in its first, middle and last element."""
    net, other = Net().to(native.device), Net().to(native.device)
    balancer, optimizer = net.balancer(noise=noise), sgd(net)
    scaler = GradScaler(native.device.type, init_scale=2.0**100)
    scaled_step(net, balancer, scaler, optimizer, 0, unscaling)
    before, state, scale = net.bits(), balancer.state_dict(), scaler.get_scale()
    for name, parameter in net.named_parameters():
        last = parameter.numel() - 1
        for at in (0, last // 2, last):

            def spoil(parameter: Tensor = parameter, at: int = at) -> None:
                parameter.grad.view(-1)[at] = torch.inf

            record = scaled_step(net, balancer, scaler, optimizer, 1, unscaling, spoil)
            assert record.skipped, (name, at)
            assert record is balancer.last
            assert torch.equal(net.bits(), before)
            assert balancer.state_dict() == state
            scale /= 2
            assert scaler.get_scale() == scale
    record = scaled_step(net, balancer, scaler, optimizer, 2, unscaling)
    assert not record.skipped
    # What comes after is what comes without the skipped steps.
    balancer, optimizer = other.balancer(noise=noise), sgd(other)
    train(other, balancer, range(1), optimizer)
    train(other, balancer, range(2, 3), optimizer)
    assert torch.equal(other.bits(), net.bits())


@pytest.mark.in_one_launch
@pytest.mark.parametrize("noise", [1.0, 0.0])
@pytest.mark.parametrize("spoiled", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0, SCALE])
def test_fused_unscaling_equals_the_scaler_bit_for_bit(
    native: Backend, monkeypatch: pytest.MonkeyPatch, noise: float, spoiled: bool, scale: float
) -> None:
    """Every type that scalers take, many chunks, gaps, other layouts."""
    assert unscales(native.device)
    generator = torch.Generator().manual_seed(1)

    def grads() -> list[Tensor]:
        generator.manual_seed(1)
        made = [
            torch.randn(9001, 3, generator=generator) * 100,
            torch.randn(7, 5, generator=generator).bfloat16(),
            torch.randn(40, 33, generator=generator).double(),
            torch.randn(4, 3, 5, 5, generator=generator).to(memory_format=torch.channels_last),
            torch.randn(12, 12, generator=generator)[:, ::2],
            torch.randn(3, 3, generator=generator) * 1e-30,
            torch.zeros(2, 2),
        ]
        if spoiled:
            made[1][3, 3] = torch.nan
        return [each.to(native.device) for each in made]

    equal = {name: torch.zeros(4, 3, device=native.device) for name in "ab"}
    equal["a"][:, 0] = 1.0
    results, states = [], []
    for fused in (True, False):
        monkeypatch.setattr(gradients, "unscales", lambda device, fused=fused: fused)
        made = grads()
        parameters = [nn.Parameter(torch.zeros_like(each)) for each in made]
        head = nn.Parameter(torch.zeros(3, device=native.device))
        made.append(torch.ones_like(head))
        for parameter, grad in zip([*parameters, head], made, strict=True):
            parameter.grad = grad
        frozen = nn.Parameter(torch.zeros(2, 2, device=native.device), requires_grad=False)
        frozen.grad = torch.ones_like(frozen)
        without = nn.Parameter(torch.zeros_like(frozen))
        own = [*parameters, head, frozen, without]
        optimizer = torch.optim.SGD([{"params": own[:3]}, {"params": own[3:]}])
        balancer = mmbal_fast.OGMGE(
            {"a": [*parameters[:4], frozen], "b": [*parameters[4:], without]},
            alpha=0.5,
            noise=noise,
        )
        scaler = GradScaler(native.device.type, init_scale=scale)
        scaler.scale(torch.ones((), device=native.device))
        target = torch.zeros(4, dtype=torch.int64, device=native.device)
        balancer.step(equal, target, grad_scaler=scaler, optimizer=optimizer)
        state = scaler._per_optimizer_states[id(optimizer)]
        assert state["stage"] is OptState.UNSCALED
        states.append(state["found_inf_per_device"])
        results.append([each.grad for each in own if each.grad is not None])
        status = balancer._status.item()
        assert status == (NON_FINITE_GRADIENT if spoiled else 0)
    for state in states:
        assert [found.item() for found in state.values()] == [float(spoiled)]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))
    assert torch.equal(results[0][7].cpu(), torch.ones(3) / scale)  # not modulated


def test_unscaling_twice_is_refused_as_ever() -> None:
    net = Net()
    balancer, optimizer, scaler = net.balancer(), sgd(net), GradScaler("cpu", init_scale=SCALE)
    logits, target = backward(net, 0, scaler)
    balancer.step(logits, target, grad_scaler=scaler, optimizer=optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step\(\)"):
        balancer.step(logits, target, grad_scaler=scaler, optimizer=optimizer)


def test_a_scaler_of_several_optimizers_skips_each_by_itself() -> None:
    net = Net()
    parts = [net.audio, net.image, net.head]
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]
    balancer, scaler = net.balancer(), GradScaler("cpu", init_scale=SCALE)
    logits, target = backward(net, 0, scaler)
    net.get_parameter("image.0.weight").grad[0, 0, 0, 0] = torch.inf
    before = [net.get_parameter(f"{name}.0.weight").clone() for name in ("audio", "image")]
    record = balancer.step(logits, target, grad_scaler=scaler, optimizer=optimizers)
    assert record.skipped
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(net.get_parameter("audio.0.weight"), before[0])
    assert torch.equal(net.get_parameter("image.0.weight"), before[1])
    assert balancer.state_dict()["step"] == 0


def test_an_optimizer_of_some_parameters_unscales_those_alone() -> None:
    net = Net()
    optimizer = torch.optim.SGD([*net.audio.parameters(), *net.head.parameters()], lr=0.1)
    balancer, scaler = net.balancer(noise=0.0, alpha=0.0), GradScaler("cpu", init_scale=SCALE)
    logits, target = backward(net, 0, scaler)
    expected = {name: each.grad.clone() for name, each in net.named_parameters()}
    balancer.step(logits, target, grad_scaler=scaler, optimizer=optimizer)
    for name, parameter in net.named_parameters():
        factor = 1.0 if name.startswith("image") else 1.0 / SCALE
        assert torch.equal(parameter.grad, expected[name] * factor), name


def test_a_disabled_balancer_unscales_too() -> None:
    net = Net()
    balancer, optimizer, scaler = net.balancer(), sgd(net), GradScaler("cpu", init_scale=SCALE)
    balancer.enabled = False
    logits, target = backward(net, 0, scaler)
    expected = [each.grad / SCALE for each in net.parameters()]
    assert not balancer.step(logits, target, grad_scaler=scaler, optimizer=optimizer).skipped
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_a_disabled_scaler_is_none() -> None:
    plain, scaled = Net(), Net()
    plain.balancer().step(*backward(plain, 0))
    balancer = scaled.balancer()
    balancer.step(*backward(scaled, 0), grad_scaler=GradScaler("cpu", enabled=False))
    for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert balancer.state_dict()["step"] == 1


def test_float16_gradients_are_refused_as_the_scaler_does() -> None:
    parameters = [nn.Parameter(torch.zeros(2, 2, dtype=torch.float16)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    balancer = mmbal_fast.OGMGE({"a": parameters[:1], "b": parameters[1:]}, alpha=0.5)
    optimizer, scaler = torch.optim.SGD(parameters), GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.ones(()))
    equal = {"a": torch.zeros(4, 3), "b": torch.zeros(4, 3)}
    target = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        balancer.step(equal, target, grad_scaler=scaler, optimizer=optimizer)
    assert all(torch.equal(each.grad, torch.ones_like(each)) for each in parameters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"grad_scaler needs optimizer=.*\(got None\)"),
        ({"optimizer": []}, r"grad_scaler needs optimizer=.*\(got \[\]\)"),
        ({"optimizer": "yes", "error_if_nonfinite": True}, "error_if_nonfinite must not be set"),
    ],
)
def test_what_a_scaler_needs(options: dict[str, Any], message: str) -> None:
    net, scaler = Net(), GradScaler("cpu", init_scale=SCALE)
    balancer = net.balancer()
    logits, target = backward(net, 0, scaler)
    if "optimizer" in options and options["optimizer"] == "yes":
        options = options | {"optimizer": sgd(net)}
    before = [each.grad.clone() for each in net.parameters()]
    with pytest.raises(ValueError, match=message):
        balancer.step(logits, target, grad_scaler=scaler, **options)
    assert all(
        torch.equal(each.grad, old) for each, old in zip(net.parameters(), before, strict=True)
    )


def test_autocast_to_bfloat16() -> None:
    plain, cast = Net(), Net()
    expected = plain.balancer().step(*backward(plain, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, target = backward(cast, 0)
    assert logits["audio"].dtype == torch.bfloat16
    found = cast.balancer().step(logits, target)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0.02, atol=0.02)
    for one, other in zip(plain.parameters(), cast.parameters(), strict=True):
        assert other.grad.dtype == torch.float32
        torch.testing.assert_close(other.grad, one.grad, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("noise", [1.0, 1e30])
def test_modulation_makes_nothing_infinite_that_was_finite(
    backend: Any, dtype: torch.dtype, noise: float
) -> None:
    largest = torch.finfo(dtype).max
    alternating = torch.tensor([largest, -largest] * 50, dtype=dtype, device=backend.device)
    outlier = torch.zeros(5000, dtype=dtype, device=backend.device)
    outlier[17] = largest
    near = torch.full((300,), largest / 3, dtype=dtype, device=backend.device)
    near[::2] /= 2
    grads = [alternating, outlier, near]
    modest = torch.randn(100).to(alternating)
    before = modest.clone()
    coefficients = torch.tensor([1.0, 0.5], device=backend.device)
    mmbal_fast.functional.modulate_([*grads, modest], coefficients, [0, 1, 0, 1], noise=noise)
    assert all(grad.isfinite().all() for grad in grads)
    assert not torch.equal(modest, before / 2)  # noise as ever


# --------------------------------------------------------------------- the rest of the training


def test_accumulation_over_micro_batches_equals_one_batch() -> None:
    whole, parts = Net(), Net()
    batch, target = batch_of(0, size=32)
    fused, logits = whole(batch)
    nn.functional.cross_entropy(fused, target).backward()
    expected = whole.balancer().step(logits, target)
    balancer = parts.balancer()
    for i in range(4):
        piece = slice(8 * i, 8 * i + 8)
        fused, logits = parts({name: each[piece] for name, each in batch.items()})
        (nn.functional.cross_entropy(fused, target[piece]) / 4).backward()
        balancer.observe(logits, target[piece])
    found = balancer.step()
    torch.testing.assert_close(found.scores, expected.scores)
    torch.testing.assert_close(found.coefficients, expected.coefficients)
    assert (found.coefficients < 1).any()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5)


def test_groups_and_optimizers_do_not_matter() -> None:
    nets = [Net(), Net(), Net()]
    train(nets[0], nets[0].balancer(), range(3))
    groups = [{"params": part.parameters(), "lr": 0.05} for part in nets[1].children()]
    train(nets[1], nets[1].balancer(), range(3), torch.optim.SGD(groups, lr=9.0, momentum=0.9))
    balancer, optimizers = nets[2].balancer(), [sgd(part) for part in nets[2].children()]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        balancer.step(*backward(nets[2], step))
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(nets[0].bits(), nets[1].bits())
    assert torch.equal(nets[0].bits(), nets[2].bits())


def test_zero_grad_in_either_way() -> None:
    nets = [Net(), Net()]
    for net, set_to_none in zip(nets, (True, False), strict=True):
        train(net, net.balancer(), range(3), set_to_none=set_to_none)
    assert torch.equal(nets[0].bits(), nets[1].bits())


def test_clipping_after_the_step_bounds_what_the_optimizer_sees() -> None:
    net = Net()
    balancer = net.balancer()
    balancer.step(*backward(net, 0))
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    norm = torch.stack([each.grad.norm() for each in net.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.1))


def test_clipping_before_the_step_clips_the_noise_with_the_gradient() -> None:
    """Modulation is linear in the gradient, up to eps: both orders give the same direction."""
    nets = [Net(), Net()]
    for net, before in zip(nets, (True, False), strict=True):
        balancer, (logits, target) = net.balancer(), backward(net, 0)
        if before:
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        balancer.step(logits, target)
        if not before:
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    first, second = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in nets)
    torch.testing.assert_close(nn.functional.cosine_similarity(first, second, 0), torch.tensor(1.0))
    assert first.norm() > 0.1 * 1.01


@pytest.mark.parametrize("set_to_none", [True, False])
def test_frozen_parameters_stay_and_come_back(set_to_none: bool) -> None:
    net = Net()
    balancer, optimizer = net.balancer(), torch.optim.SGD(net.parameters(), lr=0.05)
    train(net, balancer, range(2), optimizer, set_to_none=set_to_none)
    optimizer.zero_grad(set_to_none=set_to_none)
    net.audio.requires_grad_(False)
    before = [each.clone() for each in net.audio.parameters()]
    other = net.get_parameter("image.0.weight").clone()
    train(net, balancer, range(2, 4), optimizer, set_to_none=set_to_none)
    assert all(torch.equal(*pair) for pair in zip(net.audio.parameters(), before, strict=True))
    assert not torch.equal(net.get_parameter("image.0.weight"), other)
    net.audio.requires_grad_(True)
    optimizer.zero_grad(set_to_none=set_to_none)
    logits, target = backward(net, 4)
    grad = net.get_parameter("audio.0.weight").grad.clone()
    record = balancer.step(logits, target)
    noise = mmbal_fast.functional.noise_like(
        grad,
        seed=3,
        step=4,
        tensor_id=balancer._groups.tensor_ids[balancer._groups.names.index("audio.0.weight")],
    )
    expected = record.coefficients[0] * grad + (grad.std() + 1e-8) * noise
    torch.testing.assert_close(net.get_parameter("audio.0.weight").grad, expected)


def test_new_and_replaced_parameters_take_part() -> None:
    net = Net()
    balancer = net.balancer()
    ids = dict(zip(balancer._groups.names, balancer._groups.tensor_ids, strict=True))
    net.audio.append(nn.Linear(5, 5))
    net.image[0].weight = nn.Parameter(net.get_parameter("image.0.weight").detach().clone())
    logits, target = backward(net, 0)
    grads = {name: each.grad.clone() for name, each in net.named_parameters()}

    def modulated() -> set[str]:
        return {
            name for name, each in net.named_parameters() if not torch.equal(each.grad, grads[name])
        }

    old = {"audio.0.weight", "audio.2.weight", "image.3.weight"}
    balancer.step(logits, target)
    assert modulated() == old | {"audio.3.weight", "image.0.weight"}
    now = dict(zip(balancer._groups.names, balancer._groups.tensor_ids, strict=True))
    assert now.items() > ids.items()


def test_parameters_that_were_all_replaced_are_found_by_the_step() -> None:
    net = Net()
    balancer = net.balancer()
    for part in (net.audio, net.image):
        for module in part.modules():
            for name, parameter in list(module._parameters.items()):
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
    logits, target = backward(net, 0)
    before = net.get_parameter("audio.0.weight").grad.clone()
    balancer.step(logits, target)
    assert not torch.equal(net.get_parameter("audio.0.weight").grad, before)


def test_wrappers_do_not_change_the_noise() -> None:
    nets = [Net(), Net()]
    compiled = {
        name: torch.compile(getattr(nets[1], name), backend="eager") for name in ("audio", "image")
    }
    wrapped = nn.DataParallel(nets[1].image)
    plain = nets[0].balancer()
    checkpointed = copy.deepcopy(nets[1].audio)
    checkpointed[0] = checkpoint_wrapper(checkpointed[0])
    cases: list[Any] = [compiled, {"audio": checkpointed, "image": wrapped}]
    for encoders in cases:
        balancer = mmbal_fast.OGMGE(encoders, alpha=0.5)
        assert balancer._groups.names == plain._groups.names
        assert balancer._groups.tensor_ids == plain._groups.tensor_ids


def test_parameters_without_a_shape_yet_are_refused() -> None:
    encoders = {"a": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))}
    with pytest.raises(ValueError, match=r"pass a batch through .*got uninitialised 'b.1.weight'"):
        mmbal_fast.OGMGE(encoders, alpha=0.5)


@pytest.mark.parametrize("attribute", ["ds_id", "ds_tensor", "_hp_mapping"])
def test_partitions_of_deepspeed_are_refused(attribute: str) -> None:
    net = Net()
    setattr(net.get_parameter("image.0.weight"), attribute, 0)
    with pytest.raises(TypeError, match=r"'image' must not be .*ZeRO; use .*fully_shard"):
        net.balancer()


# ---------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("save", SAVES)
def test_resuming_is_bit_exact(save: Callable[..., Callable[[Any], None]], tmp_path: Path) -> None:
    net = Net()
    balancer = net.balancer(seed=2**63 + 1)
    optimizer = sgd(net)
    train(net, balancer, range(3), optimizer)
    load = save(balancer, tmp_path)
    balancer_state = balancer.state_dict()
    resumed = copy.deepcopy(net)
    again = sgd(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, balancer, range(3, 6), optimizer)
    other = resumed.balancer(seed=0)
    other.enabled = False
    load(other)
    assert other.state_dict() == balancer_state
    train(resumed, other, range(3, 6), again)
    assert torch.equal(resumed.bits(), net.bits())


def test_no_host_read_with_a_scaler(native: Backend, unscaling: Unscale) -> None:
    net = Net().to(native.device)
    balancer, optimizer = net.balancer(), sgd(net)
    scaler = GradScaler(native.device.type, init_scale=SCALE)
    scaled_step(net, balancer, scaler, optimizer, 0, unscaling)
    optimizer.zero_grad()
    logits, target = backward(net, 1, scaler)
    unscaling(scaler, optimizer)
    with host_reads() as found:
        balancer.step(logits, target, grad_scaler=scaler, optimizer=optimizer)
    assert found == []


def test_float16_gradients_of_float32_parameters_are_refused_too() -> None:
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    weights[1].grad_dtype = torch.float16
    for weight in weights:
        weight.grad = torch.ones(2, 2, dtype=weight.grad_dtype)
    balancer = mmbal_fast.OGMGE({"a": weights[:1], "b": weights[1:]}, alpha=0.5)
    optimizer, scaler = torch.optim.SGD(weights), GradScaler("cpu")
    scaler.scale(torch.ones(()))
    logits = {name: torch.zeros(1, 2) for name in ("a", "b")}
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        balancer.step(logits, torch.zeros(1).long(), grad_scaler=scaler, optimizer=optimizer)


# ------------------------------------------------------------------------- compilers and graphs


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this torch cannot trace backward within a graph",
)
def test_a_compiled_step_has_no_graph_break() -> None:
    """Forward, backward and modulation in one graph; bit for bit what eager code does."""
    eager, compiled = Net(), Net()
    train(eager, eager.balancer(), range(3), optimizer=torch.optim.SGD(eager.parameters(), lr=0.05))
    balancer = compiled.balancer()

    def step(batch: Logits, target: Tensor) -> Tensor:
        fused, logits = compiled(batch)
        nn.functional.cross_entropy(fused, target).backward()
        return balancer.step(logits, target).coefficients.clone()

    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.05)
    with torch._dynamo.config.patch(trace_autograd_ops=True, error_on_recompile=True):
        for i in range(3):
            optimizer.zero_grad()
            assert (whole(*batch_of(i)) < 1).any()
            optimizer.step()
    assert torch.equal(eager.bits(), compiled.bits())
    assert balancer.state_dict()["step"] == 3


@pytest.mark.parametrize(
    "options",
    [
        {"rule": lambda ratios: 1 / ratios.clamp(min=1)},
        {"noise": 0.0, "rule": "tpami2024"},
    ],
)
def test_compiled_accumulation_between_eager_backward_and_optimizer(
    options: dict[str, Any],
) -> None:
    nets = [Net(), Net()]
    for net, compiled in zip(nets, (False, True), strict=True):
        balancer = net.balancer(**options)
        observe, step = balancer.observe, balancer.step
        if compiled:
            observe = torch.compile(observe, fullgraph=True, backend="eager")
            step = torch.compile(step, fullgraph=True, backend="eager")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for i in range(2):
            optimizer.zero_grad()
            for part in range(2):
                logits, target = backward(net, 2 * i + part)
                observe({name: each.detach() for name, each in logits.items()}, target)
            step()
            optimizer.step()
    assert torch.equal(nets[0].bits(), nets[1].bits())


def test_a_compiled_step_unscales() -> None:
    bits = []
    for compiled in (False, True):
        net = Net()
        balancer, optimizer = net.balancer(), sgd(net)
        scaler = GradScaler("cpu", init_scale=SCALE)
        step = torch.compile(balancer.step, backend="eager") if compiled else balancer.step
        for i in range(2):
            optimizer.zero_grad()
            logits, target = backward(net, i, scaler)
            detached = {name: each.detach() for name, each in logits.items()}
            step(detached, target, grad_scaler=scaler, optimizer=optimizer)
            scaler.step(optimizer)
            scaler.update()
        bits.append(net.bits())
    assert torch.equal(*bits)


class OnlyViews(TorchDispatchMode):
    """Refuses torch's own work, which a replay of the kernels alone would leave out."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        assert func.is_view, f"{func} would not be captured"
        return func(*args, **(kwargs or {}))


def captured(native: Backend, step: Callable[[], object]) -> Any:
    """A graph of a step that is captured instead of run; under emulation its length is known."""
    if not native.emulated:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph
    native.native.begin_capture()
    try:
        with OnlyViews():
            step()
    finally:
        launches = native.native.end_capture()
    assert launches is not None
    return launches


def three_steps(native: Backend, noise: float, *, replayed: bool) -> Tensor:
    """The gradients after each of three steps from the same ones, after a first step."""
    net = Net()
    net.audio.append(nn.Linear(90, 150))  # of several chunks
    fresh = [torch.randn(each.shape).to(native.device) for each in net.parameters()]
    logits = {name: torch.randn(8, 3).to(native.device) for name in ("audio", "image")}
    target = torch.randint(3, (8,)).to(native.device)
    net.to(native.device)
    balancer = net.balancer(noise=noise)
    grads = [each.clone() for each in fresh]
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        parameter.grad = grad

    def step() -> None:
        balancer.step(logits, target)

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([each.flatten() for each in tensors])

    def restore() -> None:
        for grad, values in zip(grads, fresh, strict=True):
            grad.copy_(values)

    if native.emulated:
        step()  # allocates
    else:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
    restore()
    again = captured(native, step).replay if replayed else step
    assert torch.equal(flat(grads), flat(fresh))  # nothing ran
    assert balancer.state_dict()["step"] == 1
    seen = []
    for _ in range(3):
        restore()
        again()
        seen.append(flat(grads))
    assert balancer.state_dict()["step"] == 4
    assert not torch.equal(seen[0], flat(fresh))
    return torch.stack(seen)


@pytest.mark.parametrize(
    "native", ["cuda-emulated", "cuda-emulated-single", "cuda", "cuda-single"], indirect=True
)
@pytest.mark.parametrize("noise", [1.0, 0.0])
def test_a_replayed_graph_draws_new_noise(native: Backend, noise: float) -> None:
    """What three steps do that are captured once equals what they do one by one."""
    eager = three_steps(native, noise, replayed=False)
    assert torch.equal(three_steps(native, noise, replayed=True), eager)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert torch.equal(eager[one], eager[other]) == (noise == 0)


@pytest.mark.parametrize(
    ("native", "noise", "launches"),
    [
        ("cuda-emulated", 1.0, 3),  # scores, moments, update
        ("cuda-emulated", 0.0, 2),
        ("cuda-emulated-single", 1.0, 2),
        ("cuda-emulated-single", 0.0, 2),
    ],
    indirect=["native"],
)
def test_launches_of_a_step(native: Backend, noise: float, launches: int) -> None:
    net = Net()
    logits, target = backward(net, 0)
    balancer = net.balancer(noise=noise)
    detached = {name: each.detach() for name, each in logits.items()}
    balancer.step(detached, target)  # allocates
    assert len(captured(native, lambda: balancer.step(detached, target))) == launches


@pytest.mark.parametrize("native", ["cuda-emulated"], indirect=True)
def test_a_capture_refuses_what_a_graph_cannot_hold(native: Backend) -> None:
    def allocates() -> None:
        native.native.philox4x32([0] * 4, [0] * 2, 10, True)

    def copies() -> None:
        torch.ones(2).mul_(2)

    with pytest.raises(RuntimeError, match="cudaMalloc: cudaErrorStreamCaptureUnsupported"):
        captured(native, allocates)
    with pytest.raises(AssertionError, match=r"aten.* would not be captured"):
        captured(native, copies)
    captured(native, lambda: None)


def train_while_settings_change(
    net: Net, balancer: mmbal_fast.OGMGE, step: Any, steps: int
) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for i in range(steps):
        balancer.alpha = 0.1 * i
        balancer.noise = 0.05 + 0.1 * i
        optimizer.zero_grad()
        logits, target = backward(net, i)
        step({name: each.detach() for name, each in logits.items()}, target)
        optimizer.step()


def test_settings_may_change_every_epoch_under_a_compiler() -> None:
    torch._dynamo.reset()  # other tests have compiled the same code
    nets = [Net(), Net()]
    for net, compiled in zip(nets, (False, True), strict=True):
        balancer = net.balancer()
        step = balancer.step
        if compiled:
            step = torch.compile(step, fullgraph=True, backend="eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            train_while_settings_change(net, balancer, step, 12)
    assert torch.equal(nets[0].bits(), nets[1].bits())


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_settings_made_under_other_defaults_reach_a_compiled_step(other: torch.dtype | str) -> None:
    """As models are made within ``from_pretrained`` or a trainer's precision."""
    torch._dynamo.reset()
    nets = [Net(), Net()]
    for net, what in zip(nets, (torch.float32, other), strict=True):
        with default(what):
            balancer = net.balancer()
        step = torch.compile(balancer.step, fullgraph=True, backend="eager")
        train_while_settings_change(net, balancer, step, 3)
    assert torch.equal(nets[0].bits(), nets[1].bits())
