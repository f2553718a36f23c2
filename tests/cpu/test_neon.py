"""The kernels for Arm, cross-compiled and run under QEMU: the same bits as on this machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    str(ROOT / "csrc" / "cpu" / "kernels" / "gradients.cpp"),
    str(Path(__file__).parent / "print_hashes.cpp"),
]
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]


def tool(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs one of {', '.join(names)}")
    return found


def hashes(compiler: str, isa: str, folder: Path, *runner: str) -> str:
    program = str(folder / isa)
    names = [f"-DMMBAL_ISA={isa}", f"-I{ROOT / 'csrc'}"]
    command = [compiler, *FLAGS, *names, *SOURCES, "-static", "-o", program]
    subprocess.run(command, check=True, timeout=300)
    result = subprocess.run([*runner, program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_neon_gives_the_bits_of_this_machine(tmp_path: Path) -> None:
    compiler = tool("aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++-12")
    emulator = tool("qemu-aarch64-static", "qemu-aarch64")
    mine = hashes(tool("c++", "g++"), "baseline", tmp_path)
    assert len(set(mine.splitlines())) == 4 * 5 * 3
    assert hashes(compiler, "neon", tmp_path, emulator) == mine
