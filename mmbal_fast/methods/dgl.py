"""DGL: encoders learn from their own heads, the fusion from features without gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmbal_fast.functional import _checks
from mmbal_fast.training import Method, Record, Setting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class DGLRecord(Record):
    """The losses of the modalities' own heads in a step."""

    losses: Tensor = field(
        metadata={"title": "Losses of the own heads", "label": "loss", "from": 0.0}
    )
    """float32 or float64 ``[M]``, detached and unweighted."""


class DGL(Method):
    """Routes gradients: no encoder learns from the fused loss, in one backward pass.

    Wei, Luo, Luo, "Boosting Multimodal Learning via Disentangled Gradient Learning" (ICCV 2025)::

        loss = CE(fuse(detach(x_0), detach(x_1), ...), y) + alpha sum_m CE(head_m(x_m), y)

    so the gradient of the fused loss by every encoder is exactly 0, and the fusion cannot starve
    one. The released code takes two backward passes and clears the fusion's gradients in between;
    with the features detached one will do, and the gradients are the same. It also takes the shared
    fusion head with the other features at zero for the modalities' own losses: pass logits of that
    kind (`nn.unimodal_logits`) to have that, or heads of their own.

    Costs nothing: no kernel, no host read, less backward work than joint training.

    Args:
        names: of the M >= 2 modalities.
        alpha: weight of the modalities' own losses, from 0 on; default 4, of the authors' script
            for CREMA-D (5 for others).
        process_group: not used by this method, which decides nothing.

    Raises:
        ValueError: fewer than two names, one given twice, or ``alpha`` negative or NaN.
        TypeError: names that are no text, or ``alpha`` that is no number.

    Example:
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> import mmbal_fast
        >>> dgl = mmbal_fast.DGL(["audio", "image"], alpha=4.0)
        >>> features = {name: torch.ones(1, 2, requires_grad=True) for name in dgl.names}
        >>> fused = sum(dgl.detached(features).values())  # any fusion
        >>> target = torch.tensor([0])
        >>> own = {name: cross_entropy(x, target) for name, x in features.items()}
        >>> dgl.loss(cross_entropy(fused, target), own)
        tensor(6.2383, grad_fn=<AddBackward0>)
    """

    last: DGLRecord | None
    alpha = Setting(_checks.number)
    """Weight of the modalities' own losses."""

    _what = "modalities"

    def __init__(
        self,
        names: Iterable[str],
        *,
        alpha: float = 4.0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(names, process_group=process_group)
        self.alpha = alpha

    def detached(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The features for the fusion: without a way back to the encoders.

        While `enabled` is False they are as given: plain joint training.

        Raises:
            ValueError: other names.
            TypeError: no mapping.
        """
        op = f"{type(self).__name__}.detached"
        _checks.by_name(op, "features", features, self.names)
        return {
            name: features[name].detach() if self.enabled else features[name] for name in self.names
        }

    def loss(self, fused: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
        """``fused + alpha sum_m losses_m``, to be differentiated once.

        Args:
            fused: ``[]``, the loss of the fusion of `detached` features.
            losses: ``[]`` for each modality, of its own head.

        Raises:
            ValueError: other names, or a loss that is no scalar.
            TypeError: no mapping.
        """
        op = f"{type(self).__name__}.loss"
        own: list[Tensor] = _checks.by_name(op, "losses", losses, self.names)
        if any(each.ndim for each in (fused, *own)):
            shapes = [list(each.shape) for each in (fused, *own)]
            raise ValueError(f"{op}: losses must be scalars (got shapes {shapes})")
        together = torch.stack(own)
        self.last = DGLRecord(together.detach().clone())
        return fused + self.alpha * together.sum()
