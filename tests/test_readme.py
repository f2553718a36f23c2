"""What the README promises has a test, and the code that it shows runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmbal_fast

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def rows() -> list[str]:
    """Of the table of what works with what."""
    _, _, rest = README.partition("## What works with what")
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    return lines[2:]


@pytest.fixture(scope="module")
def tests() -> set[str]:
    """Names of tests, and of the checks that torchrun runs."""
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    return set(re.findall(r"^def ((?:test|check)_\w+)\(", text, re.MULTILINE))


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.split("|")[1].strip())
def test_what_works_is_shown_by_a_test(row: str, tests: set[str]) -> None:
    _, _, works, shown, _ = row.split("|")
    assert works.strip()
    named = re.findall(r"`((?:test|check)_\w+|tests/[\w/.]+)`", shown)
    assert named
    for name in named:
        assert name in tests or (ROOT / name).exists(), name


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_equivalent_pytorch_is_equivalent() -> None:
    step, equivalent = blocks()[:2]
    assert step == "balancer.step(logits, target)\n"
    encoders: Any = nn.ModuleDict({name: nn.Linear(4, 3, bias=False) for name in "abc"})
    logits = {name: torch.randn(8, 3) * (1 + index) for index, name in enumerate("abc")}
    target = torch.arange(8) % 3
    for parameter in encoders.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)  # no deviation: no noise to speak of
    names: dict[str, Any] = {
        "torch": torch,
        "alpha": 0.3,
        "target": target,
        "logits": logits,
        "grads": {name: [encoders[name].weight.grad.clone()] for name in "abc"},
    }
    exec(equivalent, names)
    balancer = mmbal_fast.OGMGE(encoders, alpha=0.3)
    exec(step, {"balancer": balancer, "logits": logits, "target": target})
    assert balancer.last is not None
    assert balancer.last.coefficients.min() < 1
    for name in "abc":
        torch.testing.assert_close(encoders[name].weight.grad, names["grads"][name][0])


def test_the_ten_lines_run() -> None:
    nets: Any = nn.ModuleDict({"audio": nn.Linear(4, 5), "visual": nn.Linear(6, 5)})
    head = nn.Linear(10, 3)
    names: dict[str, Any] = {
        "torch": torch,
        "F": nn.functional,
        "head": head,
        "audio_net": nets["audio"],
        "visual_net": nets["visual"],
        "optimizer": torch.optim.SGD([*nets.parameters(), *head.parameters()], lr=0.1),
        "loader": [(torch.randn(8, 4), torch.randn(8, 6), torch.arange(8) % 3) for _ in range(2)],
    }
    before = nets["audio"].weight.clone()
    exec(blocks()[2], names)
    assert names["balancer"].state_dict()["step"] == 2
    assert not torch.equal(nets["audio"].weight, before)
