from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from mmbal_fast import _backend, functional
from mmbal_fast.info import OPERATIONS, Check, Info, check, collect, main, render

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def info() -> Info:
    return collect()


def test_every_operation_with_a_kernel_is_checked():
    without = {"blending_weights", "overfitting_to_generalization_ratio"}  # plain Python
    assert set(OPERATIONS) == set(functional.__all__) - without


def test_every_operation_agrees_with_the_reference(native):
    for operation in OPERATIONS:
        found = check(operation, native.device)
        assert found.failure is None
        assert found.deviation is not None
        assert found.deviation < 1e-6
        assert found.backend == "native"


def test_the_reference_has_nothing_to_be_compared_with():
    with _backend.using(None):
        info = collect()
    assert info.ok
    assert info.native is None
    assert info.cuda_why_not == "there is no native module"
    on_cpu = [each for each in info.checks if each.device == "cpu"]
    assert [each.operation for each in on_cpu] == list(OPERATIONS)
    assert all(each.backend == "reference" and each.deviation is None for each in on_cpu)
    assert "runs (nothing to compare with)" in render(info)


def test_facts_about_this_machine(info):
    assert info.native is not None
    assert info.native_why_not is None
    assert info.cpu_isa in info.cpu_isas
    assert info.threads == torch.get_num_threads()
    assert info.exchange_api
    assert all("omp" in name for name in info.openmp)
    assert info.torch == torch.__version__
    assert {each.device for each in info.checks} >= {"cpu"}
    if not torch.cuda.is_available():
        assert info.cuda_why_not
        assert info.cuda_devices == ()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_an_operation_that_computes_wrong_fails(operation, factor, monkeypatch, capsys):
    right = getattr(functional, operation)

    def wrong(first, *arguments, **keywords):
        if operation == "modulate_":
            right(first, *arguments, **keywords)
            first[-1] *= factor
            return None
        result = right(first, *arguments, **keywords)
        if operation == "blended_cross_entropy":
            return result[0] * factor, result[1]
        if operation == "drop_features":
            return [each * factor for each in result[0]], *result[1:]
        return result * factor

    monkeypatch.setattr(functional, operation, wrong)
    assert "deviates by" in (check(operation, CPU).failure or "")
    assert all(check(other, CPU).failure is None for other in OPERATIONS if other != operation)
    assert main([]) == 1
    assert capsys.readouterr().out.count("FAILED: deviates by") == 1


def test_an_operation_that_raises_fails_and_the_others_still_run(monkeypatch, capsys):
    def broken(*arguments, **keywords):
        raise RuntimeError("cudaErrorNoKernelImageForDevice\nand more")

    monkeypatch.setattr(functional, "noise_like", broken)
    assert main([]) == 1
    out = capsys.readouterr().out
    assert "FAILED: RuntimeError: cudaErrorNoKernelImageForDevice\n" in out
    assert "and more" not in out
    assert out.count("ok (deviation") == len(OPERATIONS) - 1


def test_render_names_what_is_there(info):
    there = replace(
        info,
        torch_cuda="13.0",
        cuda="13.1",
        cuda_why_not=None,
        cuda_architectures=("75-real", "90"),
        cuda_devices=("NVIDIA H200",),
        checks=(Check("noise_like", "cuda:0", "native", 2e-7, None),),
    )
    lines = render(there).splitlines()
    for name, value in {
        "torch": f"{info.torch}, CUDA 13.0",
        "CUDA kernels": "present",
        "built with": "CUDA 13.1",
        "architectures": "75-real, 90",
        "devices": "NVIDIA H200",
        "cuda:0": "ok (deviation 2.0e-07)",
    }.items():
        assert any(line.strip().startswith(name) and line.endswith(value) for line in lines), name


def test_render_says_what_is_missing_and_why(info):
    missing = replace(
        info,
        native=None,
        native_why_not="the native module mmbal_fast._C was not built",
        exchange_api=False,
        openmp=("/usr/lib/libgomp.so.1", "/opt/torch/lib/libgomp.so.1"),
    )
    text = render(missing)
    assert "none: the native module mmbal_fast._C was not built" in text
    assert "absent: pip install torch-c-dlpack-ext" in text
    assert "warning: two OpenMP runtimes" in text


def test_json_is_for_programs():
    command = [sys.executable, "-m", "mmbal_fast", "info", "--json"]
    read = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert read["ok"] is True
    if sys.platform == "linux":  # torch's, which the kernels share
        assert len(read["openmp"]) == 1
    assert [each["operation"] for each in read["checks"]][: len(OPERATIONS)] == list(OPERATIONS)
