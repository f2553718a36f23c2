"""The stand-in for CUDA does what it must: see selftest.cpp for the kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FLAGS = {
    "plain": ["-O1"],
    "sanitized": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
ORDERS = [{}, {"BLOCKS": "3"}, {"SEED": "1"}, {"SEED": "2", "BLOCKS": "2"}]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(binary: Path, flags: list[str], of_kernels: list[str]) -> Path:
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{HERE / 'include'}", *flags]
    objects = {"selftest": of_kernels, "emulation": []}
    for name, more in objects.items():
        source, output = HERE / f"{name}.cpp", binary.with_name(f"{binary.name}-{name}.o")
        subprocess.run([*command, *more, "-c", source, "-o", output], check=True)
    linked = [binary.with_name(f"{binary.name}-{name}.o") for name in objects]
    subprocess.run([*command, *of_kernels, *linked, "-pthread", "-o", binary], check=True)
    return binary


@pytest.fixture(scope="module", params=FLAGS)
def selftest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("emulation")
    return build(directory / request.param, FLAGS[request.param], [])


@pytest.fixture(scope="module")
def race_detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As CMakeLists.txt builds the module for `make sanitize-threads`."""
    binary = tmp_path_factory.mktemp("emulation") / "races"
    flags = ["-O1", "-g1", "-DMMBAL_EMULATION_TSAN=1"]
    return build(binary, flags, ["-fsanitize=thread", "-Wno-tsan"])


def run(selftest: Path, case: str, **settings: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MMBAL_EMULATION_")}
    settings = {f"MMBAL_EMULATION_{name}": value for name, value in settings.items()}
    return subprocess.run(
        [selftest, case], env=inherited | settings, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("settings", ORDERS, ids=str)
@pytest.mark.parametrize(
    "case",
    ["reduction", "warps", "early_exit", "last_block_done", "tickets", "atomics_and_parameters"],
)
def test_kernels_give_the_right_answer_in_any_order(
    selftest: Path, case: str, settings: dict[str, str]
) -> None:
    result = run(selftest, case, **settings)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


@pytest.mark.parametrize("case", ["host", "capture"])
def test_host_api(selftest: Path, case: str) -> None:
    result = run(selftest, case)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


@pytest.mark.parametrize("settings", ORDERS, ids=str)
@pytest.mark.parametrize(
    ("case", "report"),
    [
        ("divergent_barrier_0", ["32 wait at __syncthreads", "selftest.cpp", "divergent"]),
        ("divergent_barrier_1", ["8 wait at __syncthreads", "24 wait at __syncwarp", "32 exited"]),
        ("divergent_barrier_2", ["mask 0xffff8000", "mask 0xffffffff", "17 exited"]),
        ("spin_forever", ["1 spin in __nanosleep", "63 wait at __syncthreads"]),
    ],
)
def test_deadlocks_are_reported(
    selftest: Path, case: str, report: list[str], settings: dict[str, str]
) -> None:
    result = run(selftest, case, **settings)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr
    assert "deadlock in block" in result.stderr
    assert "of 64 threads" in result.stderr
    assert [part for part in report if part not in result.stderr] == []


def test_a_block_that_waits_lets_others_run(selftest: Path) -> None:
    result = run(selftest, "blocks_in_flight", BLOCKS="1")
    assert result.returncode == 0
    assert "deadlock in block (0, 0, 0)" in result.stderr
    if selftest.name != "sanitized":  # one block is in flight there
        result = run(selftest, "blocks_in_flight", BLOCKS="2")
        assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


def test_missing_barrier_shows(selftest: Path) -> None:
    assert run(selftest, "missing_barrier").returncode == 0
    assert run(selftest, "order_of_threads").returncode == 0
    for seed in "123":
        assert run(selftest, "order_of_threads", SEED=seed).returncode == 1


@pytest.mark.parametrize(
    ("case", "report"),
    [
        ("shared_overflow", "insufficient space|global-buffer-overflow"),
        ("global_overflow", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
    ],
)
def test_sanitizers_see_into_kernels(selftest: Path, case: str, report: str) -> None:
    if selftest.name == "plain":
        pytest.skip("needs the sanitized build")
    result = run(selftest, case)
    assert result.returncode != 0
    assert any(text in result.stderr for text in report.split("|"))


# Blocks and threads run in another order than that of their numbers: the sanitizer gives a thread
# the identity of one of the same number in an earlier block, and one thread has no races.
ANY_ORDER = {"SEED": "2"}


@pytest.mark.parametrize(
    "case", ["shared_memory", "results_of_another_block", "counter", "last_block_done", "warps"]
)
def test_ordered_memory_is_no_race(race_detector: Path, case: str) -> None:
    result = run(race_detector, case, **ANY_ORDER)
    assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        ("missing_syncwarp", "pass_in_warp<false>"),
        ("missing_wait", "pass_to_next<false>"),
        ("missing_atomic", "count<false>"),
        ("missing_barrier", "block_sum<false>"),
        ("order_of_threads", "left_neighbour"),
    ],
)
def test_planted_races_are_caught(race_detector: Path, case: str, kernel: str) -> None:
    result = run(race_detector, case, **ANY_ORDER)
    assert result.returncode == 66
    assert "ThreadSanitizer: data race" in result.stderr
    assert f" {kernel}" in result.stderr
