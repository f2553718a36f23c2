"""Runs a module on several ranks: ``python -m tests.ranks 2 some.module argument ...``.

As torchrun would, but the ranks are forked from a process that has imported what they use. Those
of torchrun each import it anew, which takes longer than the checks. The examples go by torchrun.
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import torch.multiprocessing

TIMEOUT = 300  # seconds; a run takes a few tens


def run(
    ranks: int, module: str, *arguments: object, cwd: Path | None = None, imported: str = ""
) -> subprocess.CompletedProcess[str]:
    """A finished run, its output in ``stdout``.

    Args:
        ranks: how many.
        module: to run on each.
        arguments: of the module.
        cwd: working directory.
        imported: what the ranks import later, separated by commas.
    """
    environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", __name__, str(ranks), imported, module]
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=environment,
        cwd=cwd,
        timeout=TIMEOUT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def _run_rank(rank: int, ranks: int, port: int, module: str, arguments: list[str]) -> None:
    """In the process of the rank, whose environment is as torchrun's."""
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(ranks)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _main() -> None:
    ranks, imported, module, *arguments = sys.argv[1:]
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    for name in ("torch._dynamo", module, *filter(None, imported.split(","))):
        import_module(name)
    torch.multiprocessing.start_processes(
        _run_rank, (int(ranks), port, module, arguments), int(ranks), start_method="fork"
    )


if __name__ == "__main__":
    _main()
