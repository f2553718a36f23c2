"""Which code the tests run: each native build that this machine has, and the reference."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmbal_fast import _backend

NATIVE = ("cpu", "cuda-emulated", "cuda")
IN_ONE_LAUNCH = ("cuda-emulated-single", "cuda-single")
"""CUDA kernels that measure and update in one launch, for the tests of `modulate_`."""


@dataclass(frozen=True)
class Backend:
    """One way to run the operations."""

    name: str
    device: torch.device
    native: ModuleType | None

    @property
    def cuda_kernels(self) -> bool:
        """Whether csrc/cuda runs, on a GPU or on its stand-in."""
        return self.name.startswith("cuda")

    @property
    def emulated(self) -> bool:
        """Whether csrc/cuda runs on the CPU: a million elements take seconds."""
        return self.name.startswith("cuda-emulated")

    @contextmanager
    def running(self) -> Iterator[Backend]:
        """Makes the operations run on this backend."""
        with _backend.using(self.native, in_one_launch=self.name in IN_ONE_LAUNCH):
            yield self


@functools.cache
def native_module() -> ModuleType:
    """The native module; a test-suite without it would prove nothing."""
    if _backend.native is None:
        pytest.fail(f"needs the native module, `make build` builds it ({_backend.why_not})")
    return _backend.native


@functools.cache
def emulated_module() -> ModuleType:
    """The CUDA kernels compiled for the CPU; they take its memory for a device's."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    path = Path(__file__).parent / "emulation" / f"_C_emulated{suffix}"
    if not path.exists():
        pytest.fail(f"needs {path.name} in {path.parent}, `make build` builds it")
    spec = importlib.util.spec_from_file_location("_C_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_backend(name: str) -> Backend:
    """The backend of a name; skips the test where the machine has none."""
    if name == "reference":
        return Backend(name, torch.device("cpu"), None)
    if name.startswith("cuda-emulated"):
        return Backend(name, torch.device("cpu"), emulated_module())
    if name == "cpu":
        return Backend(name, torch.device("cpu"), native_module())
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    module = native_module()
    if module.cuda_device_count() == 0:
        pytest.fail(f"needs CUDA kernels where there is a GPU ({module.cuda_unavailable()})")
    return Backend(name, torch.device("cuda"), module)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests marked `in_one_launch` run that form of the CUDA kernels, too."""
    test = metafunc.definition
    if test.get_closest_marker("in_one_launch") is None:
        return
    chosen = {mark.args[0] for mark in test.iter_markers("parametrize")}
    for fixture, others in (("backend", ["reference", *NATIVE]), ("native", [*NATIVE])):
        if fixture in metafunc.fixturenames and fixture not in chosen:
            names = [*others, *IN_ONE_LAUNCH]
            # A mark, because pytest then leaves out the fixture's own parameters.
            test.add_marker(pytest.mark.parametrize(fixture, names, indirect=True))


@pytest.fixture(params=["reference", *NATIVE])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Runs a test on the reference and on all native code."""
    with make_backend(request.param).running() as chosen:
        yield chosen


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Runs a test on all native code."""
    with make_backend(request.param).running() as chosen:
        yield chosen


@pytest.fixture
def cpu() -> Backend:
    """The CPU kernels, to compare others with: `_backend.using(cpu.native)` switches to them."""
    return make_backend("cpu")


@pytest.fixture(autouse=True)
def _torch_state() -> Iterator[None]:
    """Every test starts from one seed, and gives the thread count back."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
