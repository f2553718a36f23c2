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

    def answer(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[0] == "/bin/nvcc"
        known = "compute_50 compute_70 compute_75 compute_80 compute_86 compute_90 compute_120"
        says = {"--version": "release 12.8, V12.8.93", "--list-gpu-arch": known.replace(" ", "\n")}
        return subprocess.CompletedProcess(command, 0, says.get(command[1], ""), "")

    monkeypatch.setattr(script.shutil, "which", which)
    monkeypatch.setattr(script.subprocess, "run", answer)
    return programs


def test_defaults(script: ModuleType, machine: set[str]) -> None:
    switches = script.Switches.read({})
    assert (switches.compiler, switches.nvcc) == ("/bin/c++", "/bin/nvcc")
    assert switches.architectures == ("75-real", "80-real", "90-real", "120")
    assert switches.jobs >= 1
    assert (switches.debug, switches.werror, switches.emulated) == (False, False, False)
    assert not switches.portable
    assert switches.sanitize == ()


def test_values_arrive(script: ModuleType, machine: set[str]) -> None:
    switches = script.Switches.read(
        {
            "CXX": "c++ -pipe",
            "DEBUG": "1",
            "MAX_JOBS": "3",
            "MMBAL_BUILD_EMULATED": "1",
            "MMBAL_FORCE_CUDA": "1",
            "MMBAL_PORTABLE": "1",
            "MMBAL_SANITIZE": "address,undefined",
            "MMBAL_WERROR": "1",
            "TORCH_CUDA_ARCH_LIST": "8.0;9.0a 12.0+PTX",
        }
    )
    assert switches.compiler == "c++ -pipe"
    assert switches.jobs == 3
    assert (switches.debug, switches.werror, switches.emulated) == (True, True, True)
    assert switches.portable
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


RELAXED = [
    "-ffast-math",
    "-Ofast",
    "-funsafe-math-optimizations",
    "-ffinite-math-only",
    "-fno-signed-zeros",
    "-ffp-model=fast",
    "-mdaz-ftz",
    "--use_fast_math",
    "-ftz=true",
]


@pytest.mark.parametrize("relaxed", RELAXED)
@pytest.mark.parametrize("name", ["CXXFLAGS", "CUDAFLAGS", "LDFLAGS", "NVCC_APPEND_FLAGS", "CXX"])
def test_flags_that_change_results_are_refused(
    script: ModuleType, machine: set[str], name: str, relaxed: str
) -> None:
    machine.add("g++")
    with pytest.raises(SystemExit) as error:
        script.Switches.read({name: f"g++ -pipe {relaxed}"})
    assert f"{name} must leave floating point exact" in str(error.value)
    assert f"(got '{relaxed}')" in str(error.value)


@pytest.mark.parametrize(
    "exact", ["-fno-fast-math", "-O2", "-march=native", "-mfma", "-ffp-contract=fast"]
)
def test_flags_that_the_build_overrides_are_taken(
    script: ModuleType, machine: set[str], exact: str
) -> None:
    script.Switches.read({"CXXFLAGS": exact})


def test_contraction_is_off_after_all_flags_of_the_user() -> None:
    """CMake puts CXXFLAGS first, a target's options last."""
    text = (ROOT / "CMakeLists.txt").read_text()
    assert "set(host_flags -ffp-contract=off" in text
    assert "--fmad=false" in text


def test_openmp_is_that_of_gcc() -> None:
    """As in torch's wheels: Clang's would be a second runtime in the process."""
    text = (ROOT / "CMakeLists.txt").read_text()
    assert text.count("find_package(OpenMP") == 1
    assert "if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)\n  find_package(OpenMP" in text


def test_without_compiler_pure_python_takes_any_flag(script: ModuleType, machine: set[str]) -> None:
    assert script.Switches.read({"CXXFLAGS": "-Ofast", "MMBAL_PURE_PYTHON": "1"}).compiler is None


def fake_nvcc(folder: Path, lines: str) -> str:
    """A script in the place of nvcc; `$*` are its arguments."""
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


REFUSES = 'case "$*" in *--version*) echo "release 12.4, V12.4.1";; *) echo "$0: error: \
-- unsupported GNU version! gcc versions later than 13 are not supported!" >&2; exit 1;; esac'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            'case "$*" in *--version*) echo "release 10.2, V10.2.89";; *) exit 1;; esac',
            r"nvcc must be of CUDA 12\.1 or later; MMBAL_CPU_ONLY=1 .* \(got '.*nvcc of 10\.2'\)",
        ),
        (
            "echo no such thing >&2; exit 1",
            r"nvcc must be of CUDA 12\.1 or later; .* \(got '.*nvcc of no such thing'\)",
        ),
        (
            REFUSES,
            r"must accept the host compiler, CUDAHOSTCXX=g\+\+-N .*; MMBAL_CPU_ONLY=1 builds "
            r"without CUDA \(got 'CUDA 12\.4: .*gcc versions later than 13 are not supported!'\)",
        ),
    ],
    ids=["too old", "broken", "refuses the compiler"],
)
@pytest.mark.parametrize("architectures", ["", "9.0"])
def test_an_nvcc_that_cannot_be_used_is_named_in_one_line(
    script: ModuleType, tmp_path: Path, lines: str, message: str, architectures: str
) -> None:
    environment = {
        "CXX": sys.executable,
        "CUDACXX": fake_nvcc(tmp_path, lines),
        "TORCH_CUDA_ARCH_LIST": architectures,
    }
    with pytest.raises(SystemExit, match=message) as error:
        script.Switches.read(environment)
    assert "\n" not in str(error.value)
    assert script.Switches.read({**environment, "MMBAL_CPU_ONLY": "1"}).nvcc is None


def test_an_nvcc_that_does_not_run_is_named(script: ModuleType, tmp_path: Path) -> None:
    path = fake_nvcc(tmp_path, "")
    Path(path).write_text("#!/no/such/interpreter\n")
    with pytest.raises(
        SystemExit, match=r"nvcc must run; MMBAL_CPU_ONLY=1 .*\(got '.*nvcc: No such"
    ):
        script.Switches.read({"CXX": sys.executable, "CUDACXX": path})


def test_the_host_compiler_that_is_named_is_what_nvcc_is_asked_about(
    script: ModuleType, tmp_path: Path
) -> None:
    answers = f'case "$*" in *"-ccbin g++-12"*) exit 0;; esac; {REFUSES}'
    environment = {"CXX": sys.executable, "CUDACXX": fake_nvcc(tmp_path, answers)}
    environment["TORCH_CUDA_ARCH_LIST"] = "9.0"
    with pytest.raises(SystemExit, match="host compiler"):
        script.Switches.read(environment)
    switches = script.Switches.read({**environment, "CUDAHOSTCXX": "g++-12"})
    assert switches.architectures == ("90-real",)


def test_a_folder_called_cmake_is_not_taken_for_the_package(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cmake", ModuleType("cmake"))
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/bin/{name}")
    assert script.find_tool("cmake", "CMAKE_BIN_DIR") == "/bin/cmake"
    monkeypatch.setattr(script.shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="cmake must be installed"):
        script.find_tool("cmake", "CMAKE_BIN_DIR")


@pytest.mark.parametrize("name", ["pybind11", "cmake", "ninja"])
def test_a_missing_build_requirement_is_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As with --no-build-isolation."""
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(script.shutil, "which", lambda _: None)
    rule = rf"mmbal_fast build: {name} must be installed \(pip install -r requirements/build.txt"
    find = script.find_package if name == "pybind11" else lambda it: script.find_tool(it, "BIN_DIR")
    with pytest.raises(SystemExit, match=rule):
        find(name)


def test_debug_of_other_programs_is_not_ours(script: ModuleType, machine: set[str]) -> None:
    assert not script.Switches.read({"DEBUG": "express:*"}).debug
