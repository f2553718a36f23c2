"""What setup.py makes of the environment, without building anything."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mmbal_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The programs that the pretended machine has; nvcc 12.8, if asked."""
    programs = {"c++", "nvcc"}

    def which(name: str) -> str | None:
        return f"/bin/{name}" if name in programs else None

    def listing(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command == ["/bin/nvcc", "--list-gpu-arch"]
        names = "compute_50 compute_70 compute_75 compute_80 compute_86 compute_90 compute_120"
        return subprocess.CompletedProcess(command, 0, names.replace(" ", "\n"))

    monkeypatch.setattr(script.shutil, "which", which)
    monkeypatch.setattr(script.subprocess, "run", listing)
    return programs


def test_defaults(script: ModuleType, machine: set[str]) -> None:
    switches = script.Switches.read({})
    assert (switches.compiler, switches.nvcc) == ("/bin/c++", "/bin/nvcc")
    assert switches.architectures == ("75-real", "80-real", "90-real", "120")
    assert switches.jobs >= 1
    assert (switches.debug, switches.werror, switches.emulated) == (False, False, False)
    assert switches.sanitize == ()


def test_values_arrive(script: ModuleType, machine: set[str]) -> None:
    switches = script.Switches.read(
        {
            "CXX": "c++ -pipe",
            "DEBUG": "1",
            "MAX_JOBS": "3",
            "MMBAL_BUILD_EMULATED": "1",
            "MMBAL_FORCE_CUDA": "1",
            "MMBAL_SANITIZE": "address,undefined",
            "MMBAL_WERROR": "1",
            "TORCH_CUDA_ARCH_LIST": "8.0;9.0a 12.0+PTX",
        }
    )
    assert switches.compiler == "c++ -pipe"
    assert switches.jobs == 3
    assert (switches.debug, switches.werror, switches.emulated) == (True, True, True)
    assert switches.sanitize == ("address", "undefined")
    assert switches.architectures == ("80-real", "90a-real", "120")


def test_a_machine_without_nvcc_builds_for_the_cpu(script: ModuleType, machine: set[str]) -> None:
    machine.remove("nvcc")
    assert script.Switches.read({}).nvcc is None


def test_a_machine_without_compiler_gets_pure_python(script: ModuleType, machine: set[str]) -> None:
    machine.clear()
    assert script.Switches.read({}).compiler is None


@pytest.mark.parametrize("switch", ["MMBAL_CPU_ONLY", "MMBAL_PURE_PYTHON"])
def test_cuda_can_be_left_out(script: ModuleType, machine: set[str], switch: str) -> None:
    assert script.Switches.read({switch: "0"}).nvcc == "/bin/nvcc"
    assert script.Switches.read({switch: "1"}).nvcc is None


def test_cuda_home_comes_before_the_search_path(script: ModuleType, machine: set[str]) -> None:
    machine.add("/opt/cuda/bin/nvcc")
    assert script.find_nvcc({"CUDA_HOME": "/opt/cuda"}) == "/bin//opt/cuda/bin/nvcc"
    assert script.find_nvcc({"CUDA_HOME": "/opt/gone"}) == "/bin/nvcc"


@pytest.mark.parametrize(
    ("environment", "lost", "message"),
    [
        ({"MMBAL_CPU_ONLY": "yes"}, "", "MMBAL_CPU_ONLY must be 0 or 1 (got 'yes')"),
        ({"MMBAL_FORCE_CUDA": "1"}, "nvcc", "MMBAL_FORCE_CUDA=1 must find nvcc"),
        ({"MMBAL_FORCE_CUDA": "1"}, "c++", "MMBAL_FORCE_CUDA=1 must find a C++ compiler"),
        (
            {"MMBAL_FORCE_CUDA": "1", "MMBAL_CPU_ONLY": "1"},
            "",
            "MMBAL_FORCE_CUDA=1 must stand alone (got 'MMBAL_CPU_ONLY=1')",
        ),
        (
            {"MMBAL_FORCE_CUDA": "1", "MMBAL_PURE_PYTHON": "1"},
            "",
            "MMBAL_FORCE_CUDA=1 must stand alone (got 'MMBAL_PURE_PYTHON=1')",
        ),
        ({"CXX": "icc"}, "", "CXX must name a C++ compiler (got 'icc')"),
        ({"CUDACXX": "clang"}, "", "CUDACXX must name a CUDA compiler (got 'clang')"),
        ({"MAX_JOBS": "0"}, "", "MAX_JOBS must be a positive number (got '0')"),
        ({"MAX_JOBS": "-2"}, "", "MAX_JOBS must be a positive number (got '-2')"),
        ({"MMBAL_SANITIZE": "memory"}, "", "MMBAL_SANITIZE must list address, undefined or be"),
        ({"MMBAL_SANITIZE": "address,thread"}, "", "MMBAL_SANITIZE must list address, undefined"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "", "must look like \"8.0;9.0+PTX\" (got 'Hopper')"),
        ({"TORCH_CUDA_ARCH_LIST": "80"}, "", "must look like \"8.0;9.0+PTX\" (got '80')"),
        ({"TORCH_CUDA_ARCH_LIST": "7.0;8.0"}, "", "must not go below 7.5 (got '7.0;8.0')"),
    ],
)
def test_a_value_that_cannot_be_is_named(
    script: ModuleType, machine: set[str], environment: dict[str, str], lost: str, message: str
) -> None:
    machine.discard(lost)
    with pytest.raises(SystemExit) as error:
        script.Switches.read(environment)
    assert str(error.value).startswith("mmbal_fast build: ")
    assert message in str(error.value)


def test_debug_of_other_programs_is_not_ours(script: ModuleType, machine: set[str]) -> None:
    assert not script.Switches.read({"DEBUG": "express:*"}).debug
