"""Builds `mmbal_fast._C` with CMake and Ninja; all else about the package is in pyproject.toml.

Switches, all read from the environment:

=========================  ====================================================================
`MMBAL_FORCE_CUDA=1`       fail where CUDA kernels cannot be built
`MMBAL_CPU_ONLY=1`         build no CUDA kernels
`MMBAL_PURE_PYTHON=1`      build no native module at all
`TORCH_CUDA_ARCH_LIST`     such as "8.0;9.0+PTX"; default: every major architecture from 7.5 on
`MAX_JOBS`                 compilers at a time; default: one per core
`DEBUG=1`                  -O0 -g
`MMBAL_SANITIZE`           "address", "undefined" or both: -O1 -g -fsanitize=...; "thread": races
                           of the emulated CUDA kernels
`MMBAL_WERROR=1`           warnings are errors
`MMBAL_PTXAS_VERBOSE=1`    print each kernel's registers and spills
`MMBAL_PORTABLE=1`         link for any Linux with glibc 2.28, stripped (GCC on x86-64)
`MMBAL_BUILD_EMULATED=1`   also build the test module that runs the CUDA kernels on the CPU
`CXX`, `CUDACXX`,          compilers, with the meaning CMake gives them
`CUDAHOSTCXX`
=========================  ====================================================================
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_ARCHITECTURE = 75
OLDEST_CUDA = (12, 1)
WITHOUT_CUDA = "MMBAL_CPU_ONLY=1 builds without CUDA"

# The noise is the same bits everywhere, sums do not cancel, NaN is reported: the compiler must not
# reorder, approximate or assume. What the build itself names comes last and needs no check.
RELAXED = re.compile(
    r"-(Ofast|ffast-math|funsafe-math-optimizations|fassociative-math|freciprocal-math"
    r"|ffinite-math-only|fno-signed-zeros|fno-honor-(nans|infinities)|fapprox-func|mrecip(=.*)?"
    r"|ffp-model=(fast|aggressive)|fdenormal-fp-math=.*|mdaz-ftz|mfpmath=387"
    r"|fsingle-precision-constant|-?use_fast_math|-?ftz=true|-?prec-(div|sqrt)=false)"
)
FLAGS = ("CXX", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


def fail(rule: str, got: object) -> SystemExit:
    """The error that ends the build, in the form all of mmbal_fast uses."""
    return SystemExit(f"mmbal_fast build: {rule} (got {got!r})")


def flag(environment: Mapping[str, str], name: str) -> bool:
    """Reads a switch that is either on or off."""
    value = environment.get(name, "")
    if value not in ("", "0", "1"):
        raise fail(f"{name} must be 0 or 1", value)
    return value == "1"


def parse_architectures(value: str) -> list[str]:
    """Translates a TORCH_CUDA_ARCH_LIST into CMake's CUDA_ARCHITECTURES.

    Example:
        >>> parse_architectures("8.0;9.0a 12.0+PTX")
        ['80-real', '90a-real', '120']
    """
    architectures = []
    for item in re.split(r"[;,\s]+", value.strip(";, \t")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise fail('TORCH_CUDA_ARCH_LIST must look like "8.0;9.0+PTX"', value)
        number = match[1] + match[2]
        if int(number) < OLDEST_ARCHITECTURE:
            raise fail("TORCH_CUDA_ARCH_LIST must not go below 7.5", value)
        architectures.append(number + match[3] + ("" if match[4] else "-real"))
    return architectures


def major_architectures(listing: str) -> list[str]:
    """From `nvcc --list-gpu-arch`: the oldest supported, each major one, PTX of the newest.

    Example:
        >>> major_architectures("compute_70 compute_75 compute_80 compute_86 compute_90")
        ['75-real', '80-real', '90']
    """
    numbers = sorted({int(number) for number in re.findall(r"compute_(\d+)\b", listing)})
    usable = [number for number in numbers if number >= OLDEST_ARCHITECTURE]
    if not usable:
        raise fail("nvcc must know an architecture from 7.5 on", listing)
    majors = [number for number in usable if number % 10 == 0 or number == usable[0]]
    return [f"{number}-real" for number in majors[:-1]] + [str(majors[-1])]


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """The CUDA compiler: CUDACXX, CUDA_HOME, CUDA_PATH, the search path, the usual place."""
    named = environment.get("CUDACXX")
    if named:
        found = shutil.which(named)
        if found is None:
            raise fail("CUDACXX must name a CUDA compiler", named)
        return found
    homes = [environment[name] for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    candidates = [f"{home}/bin/nvcc" for home in homes] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def find_compiler(environment: Mapping[str, str]) -> str | None:
    """The C++ compiler, as a value for CXX; None where the machine has none."""
    named = environment.get("CXX", "")
    if named.strip():
        if shutil.which(shlex.split(named)[0]) is None:
            raise fail("CXX must name a C++ compiler", named)
        return named
    names = ("c++", "g++", "clang++")
    return next((found for name in names if (found := shutil.which(name))), None)


def refuse_relaxed_arithmetic(environment: Mapping[str, str]) -> None:
    """Fails where a variable gives compilers a flag that changes results."""
    for name in FLAGS:
        relaxed = [
            each for each in shlex.split(environment.get(name, "")) if RELAXED.fullmatch(each)
        ]
        if relaxed:
            raise fail(
                f"{name} must leave floating point exact, or results are not those that are tested",
                " ".join(relaxed),
            )


def ask_nvcc(nvcc: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs nvcc, whatever comes of it."""
    try:
        return subprocess.run([nvcc, *options], capture_output=True, text=True)
    except OSError as error:
        raise fail(f"nvcc must run; {WITHOUT_CUDA}", f"{nvcc}: {error.strerror}") from None


def check_nvcc(nvcc: str, environment: Mapping[str, str]) -> None:
    """Fails where nvcc is too old, or does not take the host compiler."""
    oldest = ".".join(map(str, OLDEST_CUDA))
    answer = ask_nvcc(nvcc, "--version")
    match = re.search(r"release (\d+)\.(\d+)", answer.stdout)
    found = answer.stdout + answer.stderr if match is None else f"{match[1]}.{match[2]}"
    if match is None or (int(match[1]), int(match[2])) < OLDEST_CUDA:
        raise fail(
            f"nvcc must be of CUDA {oldest} or later; {WITHOUT_CUDA}", f"{nvcc} of {found.strip()}"
        )
    host = environment.get("CUDAHOSTCXX", "")
    options = [*shlex.split(environment.get("CUDAFLAGS", "")), *(["-ccbin", host] if host else [])]
    answer = ask_nvcc(nvcc, *options, "-x", "cu", "-E", os.devnull, "-o", os.devnull)
    if answer.returncode != 0:
        lines = (answer.stderr + answer.stdout).strip().splitlines() or ["no reason given"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise fail(
            "nvcc must accept the host compiler, CUDAHOSTCXX=g++-N names one that it knows; "
            + WITHOUT_CUDA,
            f"CUDA {found}: {reason.strip()}",
        )


def missing(name: str) -> SystemExit:
    """The error of a build requirement that is not there."""
    return fail(
        f"{name} must be installed (pip install -r requirements/build.txt in the clone)", None
    )


def find_package(name: str) -> ModuleType:
    """A Python package that build isolation installs."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise missing(name) from None


def find_tool(name: str, directory: str) -> str:
    """CMake or Ninja: from the Python package that build isolation installs, else from PATH."""
    try:
        return str(Path(getattr(importlib.import_module(name), directory)) / name)
    except (ImportError, AttributeError):  # no attribute: the folder `cmake` beside this file
        found = shutil.which(name)
    if found is None:
        raise missing(name)
    return found


@dataclass(frozen=True)
class Switches:
    """What the environment asks of the build, checked."""

    compiler: str | None  # None: no native module
    nvcc: str | None  # None: no CUDA kernels
    architectures: tuple[str, ...]
    jobs: int
    debug: bool
    sanitize: tuple[str, ...]
    werror: bool
    ptxas_verbose: bool
    portable: bool
    emulated: bool

    @property
    def races(self) -> bool:
        """Whether only the emulated kernels are built, to look for races."""
        return self.sanitize == ("thread",)

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Switches:
        """Reads and checks every switch.

        Raises:
            SystemExit: a switch has a value it cannot have, or asks for what the machine lacks.
        """
        force_cuda = flag(environment, "MMBAL_FORCE_CUDA")
        cpu_only = flag(environment, "MMBAL_CPU_ONLY")
        pure = flag(environment, "MMBAL_PURE_PYTHON")
        if force_cuda and (cpu_only or pure):
            other = "MMBAL_CPU_ONLY=1" if cpu_only else "MMBAL_PURE_PYTHON=1"
            raise fail("MMBAL_FORCE_CUDA=1 must stand alone", other)
        compiler = None if pure else find_compiler(environment)
        if force_cuda and compiler is None:
            raise fail("MMBAL_FORCE_CUDA=1 must find a C++ compiler: c++, g++, clang++", compiler)
        nvcc = None if cpu_only or compiler is None else find_nvcc(environment)
        if force_cuda and nvcc is None:
            raise fail(
                "MMBAL_FORCE_CUDA=1 must find nvcc: CUDACXX, CUDA_HOME, CUDA_PATH, PATH, "
                "/usr/local/cuda/bin",
                nvcc,
            )
        if compiler is not None:
            refuse_relaxed_arithmetic(environment)
        if nvcc is not None:
            check_nvcc(nvcc, environment)
        wanted = environment.get("TORCH_CUDA_ARCH_LIST", "").strip()
        architectures: list[str] = []
        if wanted:
            architectures = parse_architectures(wanted)
        elif nvcc is not None:
            architectures = major_architectures(ask_nvcc(nvcc, "--list-gpu-arch").stdout)
        jobs = environment.get("MAX_JOBS", "") or str(os.cpu_count() or 1)
        if not jobs.isdecimal() or int(jobs) == 0:
            raise fail("MAX_JOBS must be a positive number", jobs)
        sanitize = environment.get("MMBAL_SANITIZE", "")
        sanitizers = tuple(sanitize.split(",")) if sanitize else ()
        if sanitizers != ("thread",) and not set(sanitizers) <= {"address", "undefined"}:
            raise fail("MMBAL_SANITIZE must list address, undefined or be thread", sanitize)
        return cls(
            compiler=compiler,
            nvcc=nvcc,
            architectures=tuple(architectures),
            jobs=int(jobs),
            # Many programs read DEBUG: what is not the 1 torch also reads is not meant for us.
            debug=environment.get("DEBUG") == "1",
            sanitize=sanitizers,
            werror=flag(environment, "MMBAL_WERROR"),
            ptxas_verbose=flag(environment, "MMBAL_PTXAS_VERBOSE"),
            portable=flag(environment, "MMBAL_PORTABLE"),
            emulated=flag(environment, "MMBAL_BUILD_EMULATED"),
        )


class BuildNative(build_ext):
    """`build_ext` that configures and builds with CMake, incrementally, in `build/native`."""

    def finalize_options(self) -> None:
        """One place for every Python: they share what knows no Python."""
        given = self.build_temp
        super().finalize_options()
        if given is None:
            self.build_temp = str(Path(self.build_temp).parent / "native")

    @cached_property
    def switches(self) -> Switches:
        """Read once: nvcc is asked what it knows."""
        return Switches.read(os.environ)

    def build_extension(self, ext: Extension) -> None:
        """Builds the one extension module."""
        switches = self.switches
        directory = Path(self.build_temp).resolve() / (
            "-".join(("debug" if switches.debug else "release", *switches.sanitize))
        )
        directory.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        environment = {**os.environ, "CXX": switches.compiler or ""}
        try:
            self._configure(cmake, directory, output.name, switches, environment)
            command = [cmake, "--build", str(directory), "--parallel", str(switches.jobs)]
            # Targets and not values, which would configure anew.
            module = "_C_portable" if switches.portable else "_C"
            command += ["--target", *([] if switches.races else [module])]
            command += ["_C_emulated"] if switches.emulated or switches.races else []
            subprocess.run(command, check=True, env=environment)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"mmbal_fast build: {Path(error.cmd[0]).name} failed with exit code "
                f"{error.returncode}, the reason is above. MMBAL_CPU_ONLY=1 builds without CUDA, "
                "MMBAL_PURE_PYTHON=1 without native code."
            ) from None
        if switches.races:
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        built = directory / "portable" if switches.portable else directory
        self.copy_file(str(built / output.name), str(output))

    def copy_extensions_to_source(self) -> None:
        """What ``--inplace`` does with the module, if one is built."""
        if not self.switches.races:
            super().copy_extensions_to_source()

    def _configure(
        self,
        cmake: str,
        directory: Path,
        file_name: str,
        switches: Switches,
        environment: Mapping[str, str],
    ) -> None:
        pybind11 = find_package("pybind11")
        of_python = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja", "BIN_DIR"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "MMBAL_MODULE_FILE": file_name,
            "MMBAL_VERSION": self.distribution.get_version(),
        }
        values = {
            "CMAKE_BUILD_TYPE": "Debug" if switches.debug else "Release",
            "MMBAL_SANITIZE": ",".join(switches.sanitize),
            "MMBAL_WERROR": int(switches.werror),
            "MMBAL_PTXAS_VERBOSE": int(switches.ptxas_verbose),
            "MMBAL_WITH_CUDA": int(switches.nvcc is not None),
        }
        if switches.nvcc is not None:
            values["CMAKE_CUDA_COMPILER"] = switches.nvcc
            values["CMAKE_CUDA_ARCHITECTURES"] = ";".join(switches.architectures)
        read_by_cmake = ("CXX", "CXXFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS")
        toolchain = [str(ROOT), values, [environment.get(name) for name in read_by_cmake]]
        configuration = json.loads(json.dumps([toolchain, [cmake, of_python]]))
        record = directory / "configured.json"
        before = json.loads(record.read_text()) if record.exists() else [None, None]
        if before == configuration:
            return
        record.unlink(missing_ok=True)
        command = [cmake, "-S", str(ROOT), "-B", str(directory), "-G", "Ninja"]
        # --fresh forgets the compilers and paths of an earlier configuration, and its objects; for
        # another Python it is enough to look for that anew.
        command += ["-U*Python*", "-U*PYTHON*"] if before[0] == configuration[0] else ["--fresh"]
        command += [f"-D{name}={value}" for name, value in {**of_python, **values}.items()]
        subprocess.run(command, check=True, env=environment)
        record.write_text(json.dumps(configuration))


def extensions() -> list[Extension]:
    """The native module, or nothing where there is no compiler or none is wanted."""
    if Switches.read(os.environ).compiler is not None:
        return [Extension("mmbal_fast._C", sources=[])]
    if not flag(os.environ, "MMBAL_PURE_PYTHON"):
        warnings.warn(
            "mmbal_fast is built without its native module: no C++ compiler was found "
            "(c++, g++, clang++, CXX). The slower reference in plain PyTorch will run.",
            stacklevel=2,
        )
    return []


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
