"""The command line: ``mmbal-fast info | demo | compare | bench``, also ``python -m mmbal_fast``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from mmbal_fast._version import __version__

COMMANDS = {
    "info": "what is installed, what it can use, and whether every operation computes right",
    "demo": "train on colored digits with and without modulation: a table and a plot",
    "compare": "train with every method on real data or your own: tables, a plot, a CSV",
    "bench": "time the training step against the published loop",
}
"""Each is a module of `mmbal_fast` with ``main(arguments) -> exit code``, imported when asked for.

So ``info`` needs nothing but torch, while ``demo`` and ``bench`` need the extra of their name.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: command and its arguments; default those of the process.

    Returns:
        The exit code: 0 well, 1 a check of ``info`` failed, 2 a package is missing.

    Raises:
        SystemExit: by argparse, 0 after ``--help`` and 2 for arguments it does not know.
    """
    parser = argparse.ArgumentParser(
        prog="mmbal-fast",
        description="Balanced multimodal training for PyTorch.",
        epilog="\n".join(["commands:", *(f"  {name:9}{text}" for name, text in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command; try --help")
    options = parser.parse_args(argv)
    try:
        module = import_module(f"mmbal_fast.{options.command}")
        code: int = module.main(options.arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "mmbal_fast"):
            raise
        print(
            f"mmbal-fast {options.command}: the package {package} must be installed; "
            f"pip install 'mmbal-fast[{options.command}]' brings it",
            file=sys.stderr,
        )
        return 2
    return code
