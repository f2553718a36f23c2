"""What ptxas made of the kernels: no spills, no local memory, few instructions. Needs no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import native_module

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@pytest.fixture(scope="module")
def module() -> str:
    """The native module, with the machine code of its kernels."""
    if not native_module().build_info()["cuda"]:
        pytest.skip("needs a native module with CUDA kernels")
    return native_module().__file__


def tool(name: str) -> str:
    """A tool of the CUDA toolkit, or of the packages nvidia-cuda-*."""
    site = Path(sysconfig.get_paths()["purelib"])
    directories = [None, "/usr/local/cuda/bin", *map(str, site.glob("nvidia/*/bin"))]
    found = (shutil.which(name, path=directory) for directory in directories)
    path = next((path for path in found if path), None)
    if path is None:
        pytest.skip(f"needs {name} (CUDA toolkit or nvidia-cuda-{name})")
    return path


def run(*command: str, cwd: Path | None = None) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_kernels_stay_in_registers(module: str) -> None:
    usage = run(tool("cuobjdump"), "--dump-resource-usage", module)
    kernels: dict[str, list[tuple[str, str]]] = {}
    for part in usage.split("Fatbin elf code:")[1:]:
        named = re.search(r"arch = (\w+)", part)
        assert named is not None
        found = re.findall(r"Function (\w+):\n\s*REG:\d+ (.*)", part)
        assert len(found) == part.count("Function ")
        kernels.setdefault(named[1], []).extend(found)
    built = [target for target in ARCHITECTURES if target in kernels]
    assert built
    for target in built:
        assert len(kernels[target]) >= 20
        in_memory = [
            (target, name, use)
            for name, use in kernels[target]
            if "STACK:0 " not in use or "LOCAL:0 " not in use
        ]
        assert not in_memory, "architecture, kernel, bytes of stack (spills too) and local memory"


def loops(assembly: str, kernel: str) -> Iterator[list[str]]:
    """The instructions of each loop in the disassembled kernels whose names match."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    named = False
    for line in assembly.splitlines():
        if line.startswith(".text."):
            named = re.search(kernel, line) is not None
        if not named:
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


@pytest.fixture(scope="module")
def assembly(module: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The kernels disassembled, for sm_90."""
    folder = tmp_path_factory.mktemp("cubins")
    disassembler = tool("nvdisasm")
    run(tool("cuobjdump"), "--extract-elf", "sm_90", module, cwd=folder)
    cubins = sorted(folder.glob("*.cubin"))
    if not cubins:
        pytest.skip("needs a native module with kernels for sm_90")
    return "".join(run(disassembler, "-c", str(cubin)) for cubin in cubins)


# Most instructions of an element by whether the kernel unscales: of float32 and of 16 bits, where
# float16 also has to saturate.
LIMITS = {"Lb0": (45, 48), "Lb1": (48, 58)}


@pytest.mark.parametrize("kernel", ["apply_kernel", "single_launch_kernel"])
@pytest.mark.parametrize("unscales", LIMITS)
def test_instructions_of_an_element(assembly: str, kernel: str, unscales: str) -> None:
    found: dict[str, set[float]] = {"float32": set(), "16 bits": set()}
    for loop in loops(assembly, rf"{kernel}ILi\d+E{unscales}E"):
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
