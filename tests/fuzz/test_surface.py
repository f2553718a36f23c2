"""The fuzz target finds what it is for: each kind of fault, planted."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmbal_fast import functional
from tests.fuzz import surface


def sound(x: Tensor, by: float) -> Tensor:
    if by < 0:
        raise ValueError(f"scaled_: by must be a number from 0 on (got {by})")
    return x.mul_(by)


def writes_before_the_check(x: Tensor, by: float) -> Tensor:
    x.mul_(by)
    return sound(x, by)


def words_of_others(x: Tensor, by: float) -> Tensor:
    return x.mul_(by) if by >= 0 else x.view(7, 7, 7)


def takes_anything(x: Tensor, by: float) -> Tensor:
    return x.mul_(by)


def other_numbers(x: Tensor, by: float) -> Tensor:
    return sound(x, by).add_(0.01)


def cases(by: float, written: bool = True) -> Callable[[], surface.Case]:
    def case() -> surface.Case:
        x = torch.ones(3)
        return surface.Case("scaled_", (x, by), {}, [x] if written else [])

    return case


def find(function: Callable[..., Any], case: Callable[[], surface.Case]) -> list[str]:
    functions = {"reference": sound, "cpu": function}

    def run(name: str, given: surface.Case) -> surface.Outcome:
        return surface.call(functions[name], given)

    return surface.findings(case, run, list(functions))


@pytest.mark.parametrize("by", [2.0, -1.0])
def test_a_sound_operation(by: float) -> None:
    assert find(sound, cases(by)) == []


@pytest.mark.parametrize(
    ("function", "by", "finding"),
    [
        (writes_before_the_check, -1.0, "refused and written on cpu"),
        (words_of_others, -1.0, "words of others on cpu: RuntimeError"),
        (takes_anything, -1.0, "reference and cpu part: ValueError"),
        (other_numbers, 2.0, "reference and cpu give other numbers"),
    ],
)
def test_a_planted_fault(function: Callable[..., Any], by: float, finding: str) -> None:
    assert any(finding in each for each in find(function, cases(by)))


def test_what_may_not_be_written() -> None:
    assert any("done and written" in each for each in find(sound, cases(2.0, written=False)))


def test_cases_follow_from_their_seeds() -> None:
    for seed in range(100):
        one, other = surface.Draw(seed).case(), surface.Draw(seed).case()
        assert one.operation == other.operation
        assert list(one.named) == list(other.named)
        for mine, twin in zip(one.tensors(), other.tensors(), strict=True):
            assert surface.memory(mine) == surface.memory(twin)


def test_every_argument_of_every_operation_is_drawn() -> None:
    left = {
        (name, argument)
        for name in functional.__all__
        for argument in inspect.signature(getattr(functional, name)).parameters
    }
    for seed in range(1000):
        case = surface.Draw(seed).case()
        function = getattr(functional, case.operation)
        given = inspect.signature(function).bind(*case.arguments, **case.named).arguments
        left -= {(case.operation, argument) for argument in given}
    assert left == set()
