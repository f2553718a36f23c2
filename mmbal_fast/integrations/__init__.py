"""Callbacks for training frameworks. Each module needs its framework, and nothing imports them.

- `mmbal_fast.integrations.lightning`: ``pip install mmbal-fast[lightning]``
- `mmbal_fast.integrations.transformers`: ``pip install mmbal-fast[transformers]``
- Accelerate needs no callback: see ``docs/integrations.md``.
"""

from __future__ import annotations
