from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

NAME = "adamw_second_moment"
SPEC = importlib.util.spec_from_file_location(
    NAME, Path(__file__).parents[2] / "examples" / f"{NAME}.py"
)
example = importlib.util.module_from_spec(SPEC)
sys.modules[NAME] = example  # where pickle looks
SPEC.loader.exec_module(example)
AdamW: Any = example.AdamW

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "capturable-betas": {"betas": (0.5, 0.9), "weight_decay": 0.3},
}


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def fill(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for each in params:
        each.grad = torch.randn(each.shape, generator=generator)
    if step == 2:
        params[1].grad = None  # unused in this step


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("keeps", [False, True])
def test_without_modulation_it_is_torchs_bit_for_bit(case, keeps):
    ours, theirs = parameters(), parameters()
    mine = AdamW(ours, lr=0.1, **case)
    torchs = torch.optim.AdamW(theirs, lr=0.1, **case)
    for step in range(5):
        fill(ours, step)
        fill(theirs, step)
        if keeps:
            mine.keep_gradients()
        mine.step()
        torchs.step()
    for ours_each, theirs_each in zip(ours, theirs, strict=True):
        assert torch.equal(ours_each, theirs_each)
        state, expected = mine.state[ours_each], torchs.state[theirs_each]
        assert state.keys() == expected.keys()
        for name in expected:
            assert torch.equal(state[name], expected[name]), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_moments_see_what_they_should(case):
    (weight,) = params = [nn.Parameter(torch.randn(4, 3, dtype=torch.float64))]
    optimizer = AdamW(params, lr=0.1, **case)
    b1, b2 = optimizer.param_groups[0]["betas"]
    sign = -1 if case.get("maximize") else 1
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for _ in range(4):
        gradient = torch.randn_like(weight)
        weight.grad = gradient.clone()
        optimizer.keep_gradients()
        weight.grad.mul_(0.3).add_(0.1)
        modulated = weight.grad.clone()
        optimizer.step()
        first = b1 * first + (1 - b1) * sign * modulated
        second = b2 * second + (1 - b2) * gradient**2
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"], first)
        torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], second)
        assert torch.equal(weight.grad, modulated)


def test_a_steady_coefficient_scales_the_update():
    updates = {}
    for kind in (AdamW, torch.optim.AdamW):
        for k in (1.0, 0.25):
            weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
            optimizer = kind([weight], lr=0.1, weight_decay=0.0, eps=0.0)
            for step in range(3):
                weight.grad = torch.tensor([1.0, -2.0, 5.0 + step], dtype=torch.float64)
                if isinstance(optimizer, AdamW):
                    optimizer.keep_gradients()
                weight.grad *= k
                optimizer.step()
            updates[kind, k] = weight.detach()
    ours, theirs = AdamW, torch.optim.AdamW
    torch.testing.assert_close(updates[ours, 0.25], 0.25 * updates[ours, 1.0])
    torch.testing.assert_close(updates[theirs, 0.25], updates[theirs, 1.0])


def test_what_was_kept_serves_one_step():
    ours, theirs = parameters(), parameters()
    mine, torchs = AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for step in (0, 1):
        fill(ours, step)
        fill(theirs, step)
        if step == 0:
            mine.keep_gradients()
        mine.step()
        torchs.step()
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_hooks_run_once_and_closures_work():
    (weight,) = params = [nn.Parameter(torch.ones(2))]
    optimizer = AdamW(params, lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> float:
        weight.grad = torch.ones(2)
        optimizer.keep_gradients()
        weight.grad *= 0.0
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert calls == ["before", "after"]
    assert optimizer.state[weight]["exp_avg"].abs().max() < 1e-8
    assert optimizer.state[weight]["exp_avg_sq"].min() > 0


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_leave_no_trace(fused):
    (weight,) = params = [nn.Parameter(torch.ones(2))]
    optimizer = AdamW(params, lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    seen = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.unscale_(optimizer)
        optimizer.keep_gradients()
        weight.grad *= 0.5
        scaler.step(optimizer)
        scaler.update()
        seen.append((weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[1][0], seen[2][0])
    assert seen[2][1].isfinite().all()


def test_state_goes_to_torchs_and_back_and_copies_work():
    params = parameters()
    optimizer = AdamW(params, lr=0.1)
    fill(params, 0)
    optimizer.step()
    plain = torch.optim.AdamW(parameters(), lr=0.1)
    plain.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        fill(twin.param_groups[0]["params"], 1)
        twin.keep_gradients()
        twin.step()
    fill(params, 1)
    optimizer.step()
    assert torch.equal(params[0], twin.param_groups[0]["params"][0])


def test_it_prints_what_its_header_says(capsys):
    example.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed == [line.strip() for line in example.__doc__.split("\n\n")[-1].splitlines()]


def test_a_first_moment_is_needed():
    with pytest.raises(ValueError, match=r"AdamW: betas must have a first above 0 \(got 0"):
        AdamW(parameters(), betas=(0.0, 0.9))
