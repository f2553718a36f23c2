"""The frameworks are optional."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_says_what_to_install(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name == framework or name.startswith(f"{framework}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, framework, None)  # as if it were not installed
    name = f"mmbal_fast.integrations.{framework}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install mmbal-fast\[{framework}\]"):
        importlib.import_module(name)


def test_the_package_imports_no_framework() -> None:
    code = (
        "import sys, mmbal_fast;"
        "print({'accelerate', 'lightning', 'matplotlib', 'tensorboard', 'transformers'}"
        " & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        text=True,
        capture_output=True,
        check=True,
    )
    assert run.stdout == "set()\n"
