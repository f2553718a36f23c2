"""A task's model with what the rows need besides: a linear head on each encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from mmbal_fast._task import FusionModel, Loader, check_features, check_model, encode
from mmbal_fast.nn import masked_logits, unimodal_logits

Features = Mapping[str, Tensor]
"""``[B, D_m]`` of each modality, in the order of the encoders."""


class Network(nn.Module):
    """A model and a linear head on each of its encoders.

    All rows start from the same network: a row that does without the heads leaves them as they are.

    Args:
        model: encoders and their fusion.
        loader: the first batch tells widths and the number of classes.
    """

    def __init__(self, model: FusionModel, loader: Loader) -> None:
        super().__init__()
        check_model("compare", model)
        self.model = model
        ((inputs, _),) = islice(loader, 1)
        model.eval()
        with torch.no_grad():
            features = encode(model, inputs)
            check_features("compare", features)
            self.classes = model.fuse(features).shape[1]
        model.train()
        self.names = tuple(features)
        self.widths = {name: each.shape[1] for name, each in features.items()}
        """``D_m`` of each modality."""
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, self.classes) for name, width in self.widths.items()}
        )

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``[B, D_m]`` of each modality."""
        return encode(self.model, inputs)

    def fuse(self, features: Features) -> Tensor:
        """Logits ``[B, C]`` of the model."""
        return self.model.fuse(features)

    def unimodal(self, features: Features) -> dict[str, Tensor]:
        """Logits ``[B, C]`` of each modality's own head."""
        return {name: self.heads[name](each) for name, each in features.items()}

    @property
    def head(self) -> nn.Linear | None:
        """The model's ``head``, if it is one ``nn.Linear``: on the concatenated features."""
        head = getattr(self.model, "head", None)
        return head if isinstance(head, nn.Linear) else None

    @torch.no_grad()
    def shares(
        self, features: Features, otherwise: Callable[..., dict[str, Tensor]] = masked_logits
    ) -> dict[str, Tensor]:
        """What each modality contributes to the fused logits.

        Exactly, if the model has a `head`.

        Args:
            features: ``[B, D_m]`` of each modality.
            otherwise: what to ask of any other fusion; default what it says when the other
                modalities' features are zero.
        """
        if self.head is not None:
            return unimodal_logits(features, self.head)
        return otherwise(self.model.fuse, features)
