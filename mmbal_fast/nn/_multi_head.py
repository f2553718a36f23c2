"""Late fusion with a classifier for each modality beside the fused one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmbal_fast.functional import _checks


class MultiHeadLateFusion(nn.Module):
    """Encoders, a linear head on each, and a linear head on the concatenated features.

    The network that Gradient-Blending trains: Wang, Tran, Feiszli, "What Makes Training Multi-Modal
    Classification Networks Hard?" (CVPR 2020), figure 2: M modalities give M + 1 heads. A model of
    another shape works as well, if its forward returns such a dict of logits.

    Args:
        encoders: a module for each modality, from that modality's input to features ``[B, D_m]``.
        widths: the number of features ``D_m`` of each modality.
        num_classes: C.
        fused: name of the fused head, default ``"fused"``. Its logits are what to predict from.
        fused_head: from the concatenated features ``[B, D_0 + D_1 + ...]``, in the order of
            ``encoders``, to ``[B, C]``. Default one ``nn.Linear``; the paper uses a small network.
        device: device of the linear heads that are made here.
        dtype: dtype of the linear heads that are made here.

    Attributes:
        head_names: names of the heads, modalities first, as `GradientBlending` takes them.
        encoders: ``nn.ModuleDict`` of the encoders, as `OGMGE` takes them.
        heads: ``nn.ModuleDict`` of the M + 1 heads.

    Shape:
        - Input: a mapping with the input of each modality.
        - Output: a dict of ``[B, C]`` for each of ``head_names``, in that order.

    Raises:
        ValueError: fewer than two encoders, other names in ``widths``, or a modality with the name
            of the fused head.

    Example:
        >>> import torch
        >>> from mmbal_fast.nn import MultiHeadLateFusion
        >>> encoders = {"audio": torch.nn.Linear(8, 3), "image": torch.nn.Flatten()}
        >>> model = MultiHeadLateFusion(encoders, {"audio": 3, "image": 16}, num_classes=5)
        >>> logits = model({"audio": torch.randn(2, 8), "image": torch.randn(2, 4, 4)})
        >>> {name: tuple(each.shape) for name, each in logits.items()}
        {'audio': (2, 5), 'image': (2, 5), 'fused': (2, 5)}
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        widths: Mapping[str, int],
        num_classes: int,
        *,
        fused: str = "fused",
        fused_head: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "MultiHeadLateFusion"
        if len(encoders) < 2:
            raise ValueError(f"{op}: there must be at least 2 encoders (got {len(encoders)})")
        _checks.by_name(op, "widths", widths, list(encoders), "numbers")
        if fused in encoders:
            raise ValueError(f"{op}: no modality may be called like the fused head (got {fused!r})")
        self.encoders = nn.ModuleDict(encoders)

        def linear(width: int) -> nn.Linear:
            return nn.Linear(width, num_classes, device=device, dtype=dtype)

        self.heads = nn.ModuleDict({m: linear(widths[m]) for m in encoders})
        # Not `or`: an empty nn.Sequential, which hands its input on, is false.
        self.heads[fused] = linear(sum(widths.values())) if fused_head is None else fused_head
        self.head_names = tuple(self.heads)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits ``[B, C]`` of each of ``head_names`` from the inputs of all modalities.

        Raises:
            ValueError: a modality is missing or unknown.
        """
        _checks.by_name("MultiHeadLateFusion", "inputs", inputs, list(self.encoders))
        features = {name: encoder(inputs[name]) for name, encoder in self.encoders.items()}
        logits = {name: self.heads[name](each) for name, each in features.items()}
        logits[self.head_names[-1]] = self.fuse(features)
        return logits

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[B, C]`` of the fused head from the features ``[B, D_m]`` of each modality."""
        together = torch.cat([features[name] for name in self.encoders], dim=1)
        logits: Tensor = self.heads[self.head_names[-1]](together)
        return logits
