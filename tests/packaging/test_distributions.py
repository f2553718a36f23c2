"""Source distribution, wheel and installation, as a user's pip makes them."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.conftest import native_module

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps"]


def run(
    command: list[str], cwd: Path, *, ok: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if "MMBAL" not in name}
    result = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    assert (result.returncode == 0) == ok, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
    run([*command, "sdist", "--dist-dir", str(folder)], cwd=ROOT)
    return next(folder.glob("*.tar.gz"))


COMPILED = ROOT / "build" / "native" / "release"
TAKES_WHAT_IS_COMPILED = """
import os, shutil, subprocess, sys
compiled, *command = sys.argv[1:]
after = dict(zip(command, command[1:]))
output, source = after["-o"], after.get("-c", "")
if os.path.exists(source) and os.path.exists(made := os.path.join(compiled, output)):
    shutil.copy(made, output)
    if "-MF" in after:
        with open(after["-MF"], "w") as dependencies:
            print(output + ":", file=dependencies)
else:
    sys.exit(subprocess.call(command))
"""


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in pip's isolation, which holds the build requirements and nothing else: no torch.

    With the objects of ``make build``, where there are some: a minute less.
    """
    folder = tmp_path_factory.mktemp("wheel")
    options = {"DEBUG": "1", "MMBAL_CPU_ONLY": "1"}  # -O0, since only the package is looked at
    if (COMPILED / "CMakeFiles" / "_C.dir").exists():
        launcher = folder / "launcher.py"
        launcher.write_text(TAKES_WHAT_IS_COMPILED)
        command = f"{sys.executable};{launcher};{COMPILED}"
        options = {f"CMAKE_{each}_COMPILER_LAUNCHER": command for each in ("CXX", "CUDA")}
        options["MMBAL_CPU_ONLY"] = str(int(not native_module().build_info()["cuda"]))
    run([*PIP, str(sdist)], cwd=folder, ok=True, **options)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def pure_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built on a machine whose PATH holds no compiler."""
    folder = tmp_path_factory.mktemp("pure")
    command = [*PIP, "--verbose", "--no-build-isolation", str(sdist)]
    result = run(command, cwd=folder, PATH=str(folder), CXX="")
    assert "no C++ compiler was found" in result.stdout + result.stderr
    return next(folder.glob("*.whl"))


def run_installed(wheel: Path, folder: Path, code: str) -> str:
    """Runs code where the wheel, and not the working tree, is what `import` finds."""
    zipfile.ZipFile(wheel).extractall(folder)
    # Without the .pth files of site-packages: an editable install would lend its native module.
    path = os.pathsep.join([str(folder), sysconfig.get_paths()["purelib"]])
    return run([sys.executable, "-S", "-c", code], cwd=folder, PYTHONPATH=path).stdout


def test_sdist_holds_what_the_build_and_the_tests_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("cmake", "csrc", "mmbal_fast", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = {
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix not in (".so", ".pyc") and "__pycache__" not in path.parts
    }
    assert wanted | {"CMakeLists.txt", "Makefile", "LICENSE", "setup.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mmbal_fast"}
    assert "mmbal_fast/py.typed" in names
    native = [name for name in names if name.endswith(".so")]
    assert len(native) == 1
    assert native[0].startswith("mmbal_fast/_C.")
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h"))]


def test_wheel_asks_for_torch_alone(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    requirements = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    assert [item for item in requirements if "extra ==" not in item] == ["torch>=2.10"]


def test_wheel_imports_and_computes(wheel: Path, tmp_path: Path) -> None:
    code = (
        "import torch, mmbal_fast, mmbal_fast._C as c; print(c.__file__, mmbal_fast.__version__); "
        "mmbal_fast.functional.noise_like(torch.empty(5), seed=1, step=2)"
    )
    location, version = run_installed(wheel, tmp_path, code).split()
    assert Path(location).is_relative_to(tmp_path)
    assert version == wheel.name.split("-")[1]


def test_without_compiler_the_package_is_pure_python(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(pure_wheel).namelist() if name.endswith(".so")]


def test_without_native_module_the_reference_runs_after_one_warning(
    pure_wheel: Path, tmp_path: Path
) -> None:
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import mmbal_fast
    for _ in range(2):
        noise = mmbal_fast.functional.noise_like(torch.empty(5), seed=1, step=2)
assert torch.equal(noise, mmbal_fast.reference.noise_like(torch.empty(5), seed=1, step=2))
print(*[w.message for w in caught if "mmbal_fast" in str(w.message)], sep="\\n")
"""
    warnings = run_installed(pure_wheel, tmp_path, code).splitlines()
    assert len(warnings) == 1


def build_in_place_fails(folder: Path, **environment: str) -> str:
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-temp", str(folder / "temp"), "--build-lib", str(folder / "lib")]
    return run(command, cwd=ROOT, ok=False, **environment).stderr


def test_a_compiler_that_fails_fails_the_build(tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    message = build_in_place_fails(tmp_path, CXX=str(broken), MMBAL_CPU_ONLY="1")
    assert "cmake failed with exit code 1, the reason is above" in message
    assert "MMBAL_PURE_PYTHON=1 without native code" in message


def test_cuda_that_is_asked_for_and_missing_fails_the_build(tmp_path: Path) -> None:
    message = build_in_place_fails(tmp_path, MMBAL_FORCE_CUDA="1", MMBAL_CPU_ONLY="1")
    assert "mmbal_fast build: MMBAL_FORCE_CUDA=1 must stand alone" in message
