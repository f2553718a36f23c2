"""`make gpu-check` as far as it can be tried without a GPU: its parts, on the emulated kernels."""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from mmbal_fast.functional import _operation
from tests.conftest import Backend, make_backend


@pytest.fixture
def emulated() -> Any:
    with make_backend("cuda-emulated").running() as backend:
        yield backend


def test_small_set_runs_every_operation(emulated: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = set()
    plain = _operation.Operation.run

    def run(operation: Any, *arguments: Any, **eager: Any) -> Any:
        ran.add(operation.name)
        return plain(operation, *arguments, **eager)

    monkeypatch.setattr(_operation.Operation, "run", run)
    assert gpu_check.small_set(emulated) == "ok"
    assert ran == {name.split(".")[0] for name in torch.ops.mmbal}


def test_stages() -> None:
    stages = gpu_check.stages("/usr/bin/compute-sanitizer")
    assert list(stages)[:2] == ["build", "tests"]
    assert set(gpu_check.ANSWERS) < set(stages)
    assert stages["racecheck"][:3] == ["/usr/bin/compute-sanitizer", "--tool", "racecheck"]
    assert stages["racecheck"][-2:] == ["--part", "small_set"]
    assert not gpu_check.stages(None)["racecheck"]


@pytest.mark.parametrize(
    ("code", "seconds", "result"),
    [
        ("print(1)", 60.0, "ok"),
        ("raise SystemExit(3)", 60.0, "exit code 3"),
        ("import time; time.sleep(60)", 0.5, "not finished after 0 s"),
        ("print(1)", -1.0, "not run: no time left"),
    ],
)
def test_what_becomes_of_a_stage(code: str, seconds: float, result: str) -> None:
    run = functools.partial(gpu_check.run, environment={}, seconds=seconds)
    assert run("tests", [sys.executable, "-c", code]) == result
    assert gpu_check.passed(result) == (result == "ok")


def test_answers_of_a_part_are_kept() -> None:
    command = [sys.executable, "-c", "print('words'); print('{\"a\": false}')"]
    answer = gpu_check.run("graphs", command, {}, 60.0)
    assert answer == {"a": False}
    assert not gpu_check.passed(answer)


def test_two_threads_get_what_each_gets_alone(emulated: Backend) -> None:
    answer = gpu_check.threads(emulated)
    assert answer == {"two launches": True, "one launch": True}
