"""Training on several ranks: the checks of the modules beside this file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from tests import ranks

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)


def checks_of(module: str) -> list[str]:
    """The names that it defines or imports."""
    text = (HERE / f"{module}.py").read_text()
    return re.findall(r"^(?:def|   ) (check_\w+)[(,]", text, re.MULTILINE)


@pytest.fixture(scope="module")
def require_passed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, str], None]:
    """Fails unless a check of a module passed on all ranks; runs each module once."""
    outputs: dict[str, str] = {}
    folder = tmp_path_factory.mktemp("ranks")  # of all modules: what one saves another loads

    def require(module: str, count: int, check: str) -> None:
        report = folder / module
        if module not in outputs:
            outputs[module] = ranks.run(count, f"{__package__}.{module}", report).stdout
        for rank in range(count):
            path = Path(f"{report}.{rank}")
            outcome = json.loads(path.read_text()) if path.exists() else {}
            if outcome.get(check) != "":
                pytest.fail(
                    f"rank {rank} of {count}: {outcome.get(check, 'did not get there')}\n"
                    f"{outputs[module]}",
                    pytrace=False,
                )

    return require


@pytest.mark.parametrize("check", checks_of("two_ranks"))
def test_two_ranks(check: str, require_passed: Callable[[str, int, str], None]) -> None:
    require_passed("two_ranks", 2, check)


@pytest.mark.parametrize("check", checks_of("four_ranks"))
def test_four_ranks(check: str, require_passed: Callable[[str, int, str], None]) -> None:
    require_passed("two_ranks", 2, "check_saves_and_resumes")
    require_passed("four_ranks", 4, check)


@pytest.mark.parametrize("check", checks_of("one_rank"))
def test_one_rank(check: str, require_passed: Callable[[str, int, str], None]) -> None:
    require_passed("two_ranks", 2, "check_saves_and_resumes")
    require_passed("one_rank", 1, check)
