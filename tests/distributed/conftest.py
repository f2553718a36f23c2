"""The scripts are run by torchrun, not collected."""

from __future__ import annotations

collect_ignore = ["checks.py", "two_ranks.py", "four_ranks.py", "dying_rank.py"]
