"""What ranks run is not collected."""

from __future__ import annotations

collect_ignore = [
    "blending.py",
    "checks.py",
    "four_ranks.py",
    "greedy.py",
    "one_rank.py",
    "two_ranks.py",
]
