"""What ptxas makes of the kernels: no spills, no local memory, few instructions. Needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100")
FLAGS = ["-std=c++17", "-O3", "--fmad=false", f"-I{ROOT / 'csrc'}"]


@pytest.fixture(scope="module")
def nvcc() -> str:
    candidates = [os.environ.get("CUDACXX", ""), "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs nvcc (CUDACXX, PATH, /usr/local/cuda)")
    return found


@pytest.fixture(scope="module")
def nvdisasm(nvcc: str) -> str:
    directories = [None, str(Path(nvcc).resolve().parent)]
    directories += [
        str(path) for path in Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin")
    ]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        directories.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = (shutil.which("nvdisasm", path=directory) for directory in directories)
    path = next((path for path in found if path), None)
    if path is None:
        pytest.skip("needs nvdisasm (CUDA toolkit, nvidia-cuda-nvdisasm or Triton)")
    return path


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_kernels_stay_in_registers(nvcc: str, source: Path, tmp_path: Path) -> None:
    known = run(nvcc, "--list-gpu-arch").split()
    codes = [number for number in ARCHITECTURES if f"compute_{number}" in known]
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in codes]
    output = str(tmp_path / "kernels.fatbin")
    log = run(nvcc, *FLAGS, *targets, "-Xptxas=-v", "--fatbin", "-o", output, str(source))
    reports = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        log,
        re.DOTALL,
    )
    assert len(reports) == len(re.findall(r"Compiling entry function", log))
    if "__global__" in source.read_text():
        assert {target for _, target, *_ in reports} == {f"sm_{number}" for number in codes}
    in_memory = [report for report in reports if report[2:] != ("0", "0", "0")]
    assert not in_memory, "kernel, architecture, bytes of stack, spill stores, spill loads"


def loops(assembly: str, kernel: str) -> Iterator[list[str]]:
    """The instructions of each loop in the disassembled kernels whose names match."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    function = ""
    for line in assembly.splitlines():
        if section := re.match(r"\.text\.(\w+):", line):
            function = section[1]
        if re.search(kernel, function) is None:
            continue
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
            branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if branch is not None and branch[1] in labels:
                yield instructions[labels[branch[1]] :]


def count(loop: list[str], pattern: str) -> int:
    return sum(re.search(pattern, instruction) is not None for instruction in loop)


# Most instructions of an element by whether the kernel unscales: of float32 and of 16 bits, where
# float16 also has to saturate.
LIMITS = {"Lb0": (45, 48), "Lb1": (48, 58)}


@pytest.mark.parametrize(
    ("file", "kernel"),
    [("modulate.cu", "apply_kernel"), ("single_launch.cu", "single_launch_kernel")],
)
@pytest.mark.parametrize("unscales", LIMITS)
def test_instructions_of_an_element(
    nvcc: str, nvdisasm: str, tmp_path: Path, file: str, kernel: str, unscales: str
) -> None:
    cubin = str(tmp_path / "kernels.cubin")
    source = str(ROOT / "csrc" / "cuda" / file)
    run(nvcc, *FLAGS, "-gencode=arch=compute_90,code=sm_90", "-cubin", "-o", cubin, source)
    found: dict[str, set[float]] = {"float32": set(), "16 bits": set()}
    for loop in loops(run(nvdisasm, "-c", cubin), rf"{kernel}ILi\d+E{unscales}E"):
        normals = 2 * count(loop, r"\bMUFU\.RSQ\b")
        stores = count(loop, r"\bSTG\.E\.128\b")
        if normals == 0 or count(loop, r"\bDMUL\b"):
            continue
        # Where noise and memory are not in step, a loop makes more normals than it stores.
        if count(loop, r"\bF2FP\b"):
            if normals == 8 * stores:
                found["16 bits"].add(len(loop) / normals)
        elif normals == 4 * stores:
            found["float32"].add(len(loop) / normals)
    assert found["float32"]
    assert found["16 bits"]
    wide, narrow = LIMITS[unscales]
    assert max(found["float32"]) <= wide
    assert max(found["16 bits"]) <= narrow
