"""Each example runs as its header says, and prints what the header shows."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.examples.clips import make_clips

EXAMPLES = Path(__file__).parents[2] / "examples"
TIMEOUT = 300  # seconds; a run takes about 10

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)


def header(name: str) -> tuple[list[str], list[str]]:
    """The command, and the lines that the script is to print."""
    text = ast.get_docstring(ast.parse((EXAMPLES / name).read_text()))
    assert text is not None
    blocks = [part for part in text.split("\n\n") if part.startswith("    ")]
    printed = [line.strip() for line in blocks[-1].splitlines()]
    return shlex.split(blocks[0]), [line for line in printed if line != "..."]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A finished run in a folder that has the examples."""
    link = folder / "examples"
    if not link.exists():
        link.symlink_to(EXAMPLES, target_is_directory=True)
    programs = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    environment |= {"PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*programs[command[0]], *command[1:]],
        env=environment,
        cwd=folder,
        timeout=TIMEOUT,
        text=True,
        capture_output=True,
        check=False,
    )


def pattern(line: str) -> str:
    """A line of the header, with any numbers."""
    return re.sub(r"\d+(\\\.\d+)?", r"-?\\d+(\\.\\d+)?", re.escape(line))


def require(output: subprocess.CompletedProcess[str], printed: list[str]) -> None:
    if output.returncode:
        pytest.fail(output.stdout + output.stderr)
    lines = output.stdout.splitlines()
    for each in printed:
        if not any(re.fullmatch(pattern(each), line) for line in lines):
            pytest.fail(f"no line as {each!r} in\n{output.stdout}\n{output.stderr}")


@needs_gloo
@pytest.mark.parametrize("name", ["ddp_digits.py", "fsdp_digits.py"])
def test_distributed(name: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    command, printed = header(name)
    output = run(command, tmp_path)
    require(output, printed)
    assert len(re.findall(r"^epoch", output.stdout, re.MULTILINE)) == 3  # one process prints


@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_framework(framework: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    command, printed = header(f"{framework}_digits.py")
    output = run(command, tmp_path)
    require(output, printed)
    (plot,) = (tmp_path / "runs" / f"{framework}_digits").rglob("modulation.png")
    assert plot.stat().st_size > 10_000
    if framework == "lightning":
        (metrics,) = (tmp_path / "runs").rglob("metrics.csv")
        assert "balance/ratios/gray" in metrics.read_text()
    else:
        assert "'balance/ratios/gray':" in output.stdout


def test_audio_visual(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="Pillow is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    data = make_clips(tmp_path / "clips")
    command, printed = header("audio_visual.py")
    assert command[2] == "DATA"
    command[2] = str(data)
    command += ["--width=4", "--size=32", "--batch-size=8", "--workers=0", "--frames=2"]
    output = run([*command, "--epochs=2"], tmp_path)
    assert len(printed) == 3
    require(output, printed)
    assert (tmp_path / "runs" / "audio_visual" / "modulation.png").stat().st_size > 10_000
