"""``python -m mmbal_fast`` is the command line of `mmbal_fast.cli`."""

from __future__ import annotations

import sys

from mmbal_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
