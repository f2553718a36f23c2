"""What the built extension module is made of."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_C = pytest.importorskip("mmbal_fast._C", exc_type=ImportError)

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("readelf") is None,
    reason="needs readelf and an ELF module",
)


def readelf(*options: str) -> str:
    command = ["readelf", "--wide", *options, _C.__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_links_no_torch_library() -> None:
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("--dynamic")))
    assert "libc.so.6" in needed
    # libgomp under its plain name is shared with torch: one OpenMP runtime in the process.
    system = r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|libgomp|ld-linux.*)"
    sanitizers = r"lib[au]b?san"
    assert {n for n in needed if not re.fullmatch(rf"({system}|{sanitizers})\.so\.\d+", n)} == set()


def test_looks_for_libraries_where_the_system_does() -> None:
    assert not re.search(r"\((RPATH|RUNPATH)\)", readelf("--dynamic"))


def test_shows_the_outside_one_symbol() -> None:
    rows = (line.split() for line in readelf("--dyn-syms").splitlines())
    defined = {row[7] for row in rows if len(row) > 7 and row[0][:-1].isdigit() and row[6] != "UND"}
    assert defined == {"PyInit__C"}


def test_holds_cuda_code_where_it_says_so() -> None:
    assert (".nv_fatbin" in readelf("--sections")) == _C.build_info()["cuda"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(os.environ.get("MMBAL_CPU_ONLY") == "1", reason="MMBAL_CPU_ONLY=1")
def test_nvcc_is_used_where_there_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", _C.build_info()["cuda_version"])


def test_kernels_share_no_function() -> None:
    """The linker keeps one of several equal inline functions; an AVX copy kills an older CPU."""
    archives = list((ROOT / "build").glob("native/release/libkernels_*.a"))
    if not archives:
        pytest.skip("not built in this tree")
    for archive in archives:
        rows = subprocess.run(["nm", archive], check=True, capture_output=True, text=True).stdout
        assert "gradients.cpp.o" in rows
        assert re.findall(r"^\w+ [WVu] (\w+)$", rows, re.MULTILINE) == []
