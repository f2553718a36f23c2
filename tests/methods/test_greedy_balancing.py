"""`GreedyBalancing` against the algorithm written with `if`; resuming; no waiting."""

from __future__ import annotations

import copy
import io
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from mmbal_fast import GreedyBalancing
from mmbal_fast.nn import MMTM
from tests.host_reads import host_reads
from tests.methods.checkpoints import SAVES


class Net(nn.Module):
    """A linear layer and a classifier for each branch, and two MMTMs."""

    branches: Any
    mmtms: Any

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleDict(
            {f"m{m}": nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 3)]) for m in range(count)}
        )
        self.mmtms = nn.ModuleList([MMTM([4] * count), MMTM([3] * count)])

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        features = list(inputs)
        for layer, mmtm in enumerate(self.mmtms):
            branches = self.branches.values()
            features = mmtm(*(b[layer](x) for b, x in zip(branches, features, strict=True)))
        return list(features)


def backward(model: Net, step: int, scaler: GradScaler | None = None) -> None:
    generator = torch.Generator().manual_seed(step)
    logits = model(*(torch.randn(6, 3, generator=generator) for _ in model.branches))
    model.zero_grad()
    target = torch.arange(6) % 3
    loss = torch.stack([nn.functional.cross_entropy(each, target) for each in logits]).sum()
    (loss if scaler is None else scaler.scale(loss)).backward()


class Script:
    """Sets gradients so that ``mu`` is what the script says."""

    def __init__(self, count: int = 2, **options: Any) -> None:
        self.model = Net(count)
        self.balancing = GreedyBalancing(self.model, **options)
        self.mu_main = [1.0] * count

    def step(self, *mu_bypass: float) -> int:
        """One step; the branch that the next one rebalances, -1 for none."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for m, branch in enumerate(self.model.branches.values()):
            bypass = [p for mmtm in self.model.mmtms for p in mmtm.bypass_parameters(m)]
            own = self.model.mmtms[0].gates[m].weight
            self._fill(own, bypass, mu_bypass[m])
            self._fill(branch[0].weight, list(branch.parameters()), self.mu_main[m])
        branch = self.balancing.step().branch
        for mmtm in self.model.mmtms:
            expected = [m == branch for m in range(len(mu_bypass))]
            assert mmtm.average_gate.tolist() == expected
        return int(branch)

    @staticmethod
    def _fill(one: Tensor, group: list[Tensor], mu: float) -> None:
        norm = sum(p.detach().double().square().sum() for p in group)
        one.grad = torch.full_like(one, math.sqrt(mu * norm / one.numel()))


def simulate(
    script: list[tuple[float, float]], warmup: int, epsilon: float, window: int
) -> list[int]:
    """Which branch each step rebalances, with Python's numbers and `if`."""
    totals, left, branch, out = [0.0, 0.0], 0, -1, []
    for t, mu in enumerate(script, start=1):
        out.append(branch)
        if left:
            left -= 1
            if left == 0:
                branch = -1
            continue
        totals = [total + each for total, each in zip(totals, mu, strict=True)]
        difference = math.log10(totals[0] / totals[1])
        if t > warmup and abs(difference) > epsilon:
            left, branch = window, 0 if difference > 0 else 1
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [1, 2, 5])
def test_follows_the_algorithm(seed: int, window: int) -> None:
    rng = random.Random(seed)
    script = [(10 ** rng.uniform(-1, 1), 10 ** rng.uniform(-1, 1)) for _ in range(60)]
    warmup, epsilon = rng.randrange(8), rng.choice([0.01, 0.1, 0.3])
    run = Script(warmup_steps=warmup, epsilon=epsilon, window=window)
    for mu in script:
        run.step(*mu)
    expected = simulate(script, warmup, epsilon, window)
    assert max(expected) >= 0
    assert run.balancing.log.rebalanced.tolist() == expected
    # A decision is logged in the step before its window.
    pairs = zip([-1, *expected], expected, strict=False)
    opened = [now if now != before else -1 for before, now in pairs]
    assert run.balancing.log.decision.tolist()[:-1] == opened[1:]


def test_warms_up_first() -> None:
    run = Script(warmup_steps=3, window=1)
    assert [run.step(100.0, 1.0) for _ in range(6)] == [-1, -1, -1, 0, -1, 0]


@pytest.mark.parametrize(
    ("difference", "branch"), [(0.0101, 0), (0.0099, -1), (-0.0099, -1), (-0.0101, 1)]
)
def test_threshold_is_on_the_absolute_difference(difference: float, branch: int) -> None:
    run = Script(warmup_steps=0)
    assert run.step(10**difference, 1.0) == branch


def test_window_has_its_length_and_pauses_accumulation() -> None:
    run = Script(warmup_steps=0, window=3)
    assert run.step(10.0, 1.0) == 0
    speed = run.balancing.learning_speed.speed
    assert [run.step(1.0, 1e6) for _ in range(3)] == [0, 0, -1]
    assert torch.equal(run.balancing.learning_speed.speed, speed)
    assert run.step(1.0, 1e6) == 1
    assert not torch.equal(run.balancing.learning_speed.speed, speed)


def test_of_three_the_fastest_is_rebalanced() -> None:
    run = Script(3, warmup_steps=0, epsilon=0.5)
    assert run.step(1.0, 1.0, 2.0) == -1
    run = Script(3, warmup_steps=0, epsilon=0.5)
    assert run.step(1.0, 10.0, 5.0) == 1
    run = Script(3, warmup_steps=0, epsilon=0.5)
    assert run.step(0.1, 1.0, 2.0) == 2  # 0.80 above the mean of the others


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rebalancing", [False, True])
def test_step_that_is_not_finite_leaves_no_trace(bad: float, rebalancing: bool) -> None:
    run = Script(warmup_steps=0 if rebalancing else 2, window=4)
    run.step(10.0, 1.0)
    before = copy.deepcopy(run.balancing.state_dict())
    run.model.branches["m1"][0].weight.grad[0, 0] = bad
    assert int(run.balancing.step().branch) == (0 if rebalancing else -1)
    after = run.balancing.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if k not in ("names", "enabled"))


def test_undefined_speeds_start_no_window() -> None:
    run = Script(warmup_steps=0)
    assert run.step(0.0, 1.0) == -1  # log10(0): branch 0 learns nothing from the other
    run = Script(warmup_steps=0)
    run.mu_main[0] = 0.0
    assert run.step(1.0, 1.0) == -1


def test_branch_in_a_window_learns_from_its_own_modality_only() -> None:
    model = Net()
    balancing = GreedyBalancing(model, warmup_steps=0, epsilon=0.0)
    backward(model, 0)
    chosen = int(balancing.step().branch)
    assert chosen >= 0
    backward(model, 1)
    for mmtm in model.mmtms:
        assert not mmtm.gates[chosen].weight.grad.any()
        assert mmtm.gates[1 - chosen].weight.grad.any()


def test_log_keeps_the_last_steps_in_order() -> None:
    run = Script(warmup_steps=2, window=2, log_size=4)
    speeds = []
    for step in range(6):
        run.step(1.0 + step, 1.0)
        speeds.append(run.balancing.learning_speed.speed)
    log = run.balancing.log
    assert log.step.tolist() == [3, 4, 5, 6]
    assert log.rebalanced.tolist() == [-1, 0, 0, -1]
    assert log.decision.tolist() == [0, -1, -1, 0]
    assert torch.equal(log.speed, torch.stack(speeds[2:]))


def test_log_of_a_step_that_does_not_count_takes_no_other_steps_place() -> None:
    run = Script(warmup_steps=0, window=1, log_size=3)
    for step in range(8):
        run.step(1.0 + step, 1.0)
        kept = [each.clone() for each in run.balancing.log]
        next(run.model.parameters()).grad.fill_(torch.nan)
        run.balancing.step()
        assert all(map(torch.equal, run.balancing.log, kept))
    assert run.balancing.log.step.tolist() == [6, 7, 8]


def test_log_starts_empty() -> None:
    log = Script(warmup_steps=0).balancing.log
    assert log.step.shape == (0,)
    assert log.speed.shape == (0, 2)


def train(model: Net, balancing: GreedyBalancing, optimizer: Any, steps: range) -> list[int]:
    branches = []
    for step in steps:
        backward(model, step)
        branches.append(int(balancing.step().branch))
        optimizer.step()
    return branches


def test_resumes_bit_for_bit_in_the_middle_of_a_window() -> None:
    def setup() -> tuple[Net, GreedyBalancing, Any]:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, GreedyBalancing(model, warmup_steps=2, epsilon=0.0, log_size=16), optimizer

    parts = setup()
    before = train(*parts, range(5))
    assert before[-1] >= 0  # a window is open
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    expected = train(*parts, range(5, 20))
    file.seek(0)
    others = setup()
    for part, state in zip(others, torch.load(file), strict=True):
        part.load_state_dict(state)
    for one, other in zip(parts[0].mmtms, others[0].mmtms, strict=True):
        assert other.average_gate.any() or not one.average_gate.any()
    assert train(*others, range(5, 20)) == expected
    for one, other in zip(parts[0].parameters(), others[0].parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(parts[1].log, others[1].log, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("save", SAVES)
def test_resumes_from_any_kind_of_checkpoint(save: Any, tmp_path: Path) -> None:
    model = Net()
    options: dict[str, Any] = {"warmup_steps": 2, "epsilon": 0.0, "log_size": 16}
    balancing = GreedyBalancing(model, **options)
    train(model, balancing, torch.optim.SGD(model.parameters(), lr=0.1), range(5))
    load = save(balancing, tmp_path)
    expected = copy.deepcopy(balancing.state_dict())
    other = GreedyBalancing(Net(), **options)
    load(other)
    found = other.state_dict()
    assert found.keys() == expected.keys()
    assert str(found) == str(expected)
    tensors = set(found) - {"names", "enabled"}
    assert all(torch.equal(found[key], expected[key]) for key in tensors)


def test_state_is_a_copy() -> None:
    run = Script(warmup_steps=0)
    run.step(10.0, 1.0)
    state = run.balancing.state_dict()
    kept = copy.deepcopy(state)
    run.step(10.0, 1.0)
    assert all(torch.equal(state[k], kept[k]) for k in state if k not in ("names", "enabled"))


def test_refuses_other_states() -> None:
    state = Script(warmup_steps=0).balancing.state_dict()
    with pytest.raises(ValueError, match=r"log must have shape \[7, 5\] \(got \[4096, 5\]\)"):
        Script(warmup_steps=0, log_size=7).balancing.load_state_dict(state)
    other = Script(3, warmup_steps=0)
    with pytest.raises(ValueError, match=r"names must be .*\(got \['m0', 'm1'\]\)"):
        other.balancing.load_state_dict(state)
    del state["remaining"]
    same = Script(warmup_steps=0).balancing
    before = same.state_dict()
    with pytest.raises(ValueError, match=r"state must have the keys branch, .*\(got \['bra"):
        same.load_state_dict(state | {"totals": torch.ones(2, 2)})
    assert str(same.state_dict()) == str(before)


def test_disabling_ends_the_window() -> None:
    run = Script(warmup_steps=0)
    assert run.step(10.0, 1.0) == 0
    assert run.balancing.enabled
    run.balancing.enabled = False
    assert not any(mmtm.average_gate.any() for mmtm in run.model.mmtms)
    state = run.balancing.state_dict()
    assert run.step(10.0, 1.0) == -1
    assert torch.equal(run.balancing.state_dict()["totals"], state["totals"])
    run.balancing.enabled = True
    assert run.step(10.0, 1.0) == 0


def test_never_makes_the_host_wait() -> None:
    model = Net()
    balancing = GreedyBalancing(model, warmup_steps=1, epsilon=0.0, window=2)
    with host_reads() as found:
        for step in range(6):
            backward(model, step)
            balancing.step()
        for mode in ("normal", "average_gate", "isolated"):
            model.mmtms[0].set_mode(mode)
            backward(model, 0)
    assert found == []
    assert balancing.log.decision.max() >= 0


def scaled_step(
    net: Net, balancing: GreedyBalancing, scaler: GradScaler, optimizer: Any, unscale: bool
) -> None:
    if unscale:
        scaler.unscale_(optimizer)
    balancing.step(grad_scaler=scaler, optimizer=optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("unscale", [False, True])
def test_training_with_a_scaler_equals_training_without(unscale: bool) -> None:
    plain, scaled = Net(), Net()
    options: dict[str, Any] = {"warmup_steps": 1, "epsilon": 0.0, "window": 2}
    expected = GreedyBalancing(plain, **options)
    train(plain, expected, torch.optim.SGD(plain.parameters(), lr=0.1), range(6))
    balancing, optimizer = GreedyBalancing(scaled, **options), torch.optim.SGD(scaled.parameters())
    optimizer.param_groups[0]["lr"] = 0.1
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=2)  # changes in between
    for step in range(6):
        backward(scaled, step, scaler)
        scaled_step(scaled, balancing, scaler, optimizer, unscale)
    assert expected.log.decision.max() >= 0
    assert all(map(torch.equal, balancing.log, expected.log))
    assert all(map(torch.equal, scaled.parameters(), plain.parameters()))


@pytest.mark.parametrize("unscale", [False, True])
def test_steps_that_a_scaler_skips_leave_no_trace(unscale: bool) -> None:
    """Also where the gradient that is not finite is of a parameter in no branch."""
    net, head = Net(), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([*net.parameters(), head], lr=0.1)
    balancing = GreedyBalancing(net, warmup_steps=1, epsilon=0.0, window=2)
    scaler = GradScaler("cpu", init_scale=2.0**20)
    for step in range(6):  # before the warm-up's end, in a window and behind it
        for bad in (head, net.mmtms[0].gates[0].bias, None):
            backward(net, step, scaler)
            head.grad = torch.ones(2)
            if bad is not None:
                bad.grad[-1] = torch.inf
            kept = copy.deepcopy(balancing.state_dict())
            before = [each.detach().clone() for each in net.parameters()]
            scaled_step(net, balancing, scaler, optimizer, unscale)
            same = all(map(torch.equal, net.parameters(), before))
            state = balancing.state_dict()
            tensors = set(kept) - {"names", "enabled"}
            unchanged = all(torch.equal(kept[key], state[key]) for key in tensors)
            assert same == unchanged == (bad is not None)
    assert balancing.log.decision.max() >= 0


def test_accumulation_over_micro_batches_equals_one_batch() -> None:
    inputs, target = torch.randn(2, 24, 3), torch.arange(24) % 3
    nets, speeds = [Net(), Net()], []
    for net, parts in zip(nets, (1, 4), strict=True):
        balancing = GreedyBalancing(net, warmup_steps=0, epsilon=0.0)
        for batch, labels in zip(inputs.chunk(parts, 1), target.chunk(parts), strict=True):
            losses = [nn.functional.cross_entropy(each, labels) for each in net(*batch)]
            (torch.stack(losses).sum() / parts).backward()
        speeds.append(balancing.step().speed)
    torch.testing.assert_close(speeds[1], speeds[0], rtol=1e-4, atol=1e-5)
    for one, other in zip(nets[0].mmtms, nets[1].mmtms, strict=True):
        assert one.num_samples == other.num_samples == 24
        torch.testing.assert_close(other.running_gate, one.running_gate)
        torch.testing.assert_close(other.running_squeeze, one.running_squeeze)
        assert torch.equal(other.average_gate, one.average_gate)
        assert one.average_gate.any()


def test_a_new_object_goes_on_with_new_parameters() -> None:
    model = Net()
    options: dict[str, Any] = {"warmup_steps": 1, "epsilon": 0.0}
    balancing = GreedyBalancing(model, **options)
    train(model, balancing, torch.optim.SGD(model.parameters(), lr=0.1), range(3))
    model.branches["m0"].append(nn.Linear(3, 3))
    again = GreedyBalancing(model, **options)
    again.load_state_dict(balancing.state_dict())
    assert all(map(torch.equal, again.log, balancing.log))
    new = model.branches["m0"][2]
    assert any(each is new.weight for each in again.learning_speed._parameters)


def test_new_parameters_are_followed() -> None:
    model = Net()
    balancing = GreedyBalancing(model, warmup_steps=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, balancing, optimizer, range(1))
    model.branches["m0"].append(nn.Linear(3, 3))
    train(model, balancing, optimizer, range(1, 2))
    new = model.branches["m0"][2]
    assert any(each is new.weight for each in balancing.learning_speed._parameters)


def test_a_scaler_needs_its_optimizer_and_counts_only_if_it_is_enabled() -> None:
    model = Net()
    balancing = GreedyBalancing(model, warmup_steps=0)
    backward(model, 0)
    with pytest.raises(ValueError, match=r"GreedyBalancing.step: grad_scaler needs .*got None"):
        balancing.step(grad_scaler=GradScaler("cpu"))
    balancing.step(grad_scaler=GradScaler("cpu", enabled=False))
    assert int(balancing.state_dict()["step"]) == 1


def test_a_compiled_model_is_not_compiled_again_in_a_window() -> None:
    nets = [Net(), Net()]
    records = []
    for net in nets:
        model: Any = net
        if net is nets[1]:
            model = torch.compile(net, fullgraph=True, backend="aot_eager")
            backward(model, 0)
        balancing = GreedyBalancing(model, warmup_steps=1, epsilon=0.0, window=2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net.zero_grad()
        for mmtm in net.mmtms:
            mmtm.reset_averages()
        with torch.compiler.set_stance("fail_on_recompile"):
            records.append(train(model, balancing, optimizer, range(8)))
    assert records[0] == records[1]
    assert len(set(records[0])) > 1
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(one, other)


def test_finds_branches_by_module() -> None:
    model = Net()
    assert GreedyBalancing(model, warmup_steps=0).names == ("m0", "m1")
    named = {"image": model.branches["m0"], "audio": model.branches["m1"]}
    assert GreedyBalancing(model, warmup_steps=0, branches=named).names == ("image", "audio")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, r"warmup_steps must be from 0 to \d+ \(got -1\)"),
        ({"epsilon": math.nan}, r"epsilon must be a number from 0 on \(got nan\)"),
        ({"epsilon": -0.1}, r"epsilon must be a number from 0 on \(got -0.1\)"),
        ({"window": 0}, r"window must be from 1 to \d+ \(got 0\)"),
        ({"log_size": 0}, r"log_size must be from 1 to \d+ \(got 0\)"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"GreedyBalancing: {message}"):
        GreedyBalancing(Net(), **{"warmup_steps": 0, **options})
