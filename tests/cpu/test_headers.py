"""Every header says itself what it needs: it compiles alone."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[2]


def comes_first(header: Path) -> bool:
    """Whether its own source begins with it, so that it compiles alone in every build."""
    for source in (header.with_suffix(".cpp"), header.with_suffix(".cu")):
        includes = (
            re.findall(r'^#include "(.*)"|^#include <', source.read_text(), re.M)
            if source.exists()
            else []
        )
        if includes and includes[0] == str(header.relative_to(ROOT / "csrc")):
            return True
    return False


HEADERS = [each for each in sorted((ROOT / "csrc").rglob("*.h")) if not comes_first(each)]
FOLDERS = sorted({header.parent for header in HEADERS})
FLAGS = ["-std=c++17", "-fsyntax-only", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
INCLUDES = [ROOT / "csrc", ROOT / "tests" / "emulation" / "include"]
SYSTEM = [pybind11.get_include(), sysconfig.get_paths()["include"]]


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_headers_compile_alone(folder: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs c++")
    for header in (each for each in HEADERS if each.parent == folder):
        command = [compiler, *FLAGS, *(f"-I{path}" for path in INCLUDES)]
        command += [part for path in SYSTEM for part in ("-isystem", path)]
        # Included, so that what is in it but not inline is reported as unused.
        command += ["-x", "c++", "-include", str(header), "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"
