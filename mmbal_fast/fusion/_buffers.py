"""Buffers that half precision does not reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class WideBuffers(nn.Module):
    """A module whose buffers stay in float32 or float64 when the model goes to half precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.half()` must not round a covariance: half precision moves the buffers only.
        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype.itemsize < 4 else moved

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return self
