"""Training on several ranks: the checks of the scripts beside this file, run by torchrun."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

HERE = Path(__file__).parent
TIMEOUT = 300  # seconds; a run takes a few tens

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)


def torchrun(script: str, ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A finished run of a script of this folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", str(HERE / script)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    environment["PYTHONPATH"] = str(HERE.parents[1])
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=environment,
        timeout=TIMEOUT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def checks_of(script: str) -> list[str]:
    """The names that it defines or imports."""
    return re.findall(r"^(?:def|   ) (check_\w+)[(,]", (HERE / script).read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def require_passed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, str], None]:
    """Fails unless a check of a script passed on all ranks; runs each script once."""
    outputs: dict[tuple[str, int], str] = {}
    folder = tmp_path_factory.mktemp("torchrun")  # of all scripts: what one saves another loads

    def require(script: str, ranks: int, check: str) -> None:
        report = folder / f"{script}.{ranks}"
        if (script, ranks) not in outputs:
            outputs[script, ranks] = torchrun(script, ranks, report).stdout
        for rank in range(ranks):
            path = Path(f"{report}.{rank}")
            outcome = json.loads(path.read_text()) if path.exists() else {}
            if outcome.get(check) != "":
                pytest.fail(
                    f"rank {rank} of {ranks}: {outcome.get(check, 'did not get there')}\n"
                    f"{outputs[script, ranks]}",
                    pytrace=False,
                )

    return require


@pytest.mark.parametrize("check", checks_of("two_ranks.py"))
def test_two_ranks(check: str, require_passed: Callable[[str, int, str], None]) -> None:
    require_passed("two_ranks.py", 2, check)


@pytest.mark.parametrize("check", checks_of("four_ranks.py"))
def test_four_ranks(check: str, require_passed: Callable[[str, int, str], None]) -> None:
    require_passed("two_ranks.py", 2, "check_saves_and_resumes")
    require_passed("four_ranks.py", 4, check)


@pytest.mark.parametrize("check", checks_of("one_rank.py"))
def test_one_rank(check: str, require_passed: Callable[[str, int, str], None]) -> None:
    require_passed("two_ranks.py", 2, "check_saves_and_resumes")
    require_passed("one_rank.py", 1, check)
