"""What is timed: lists of gradients as real networks have them, and batches of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESNET18_CONVOLUTIONS = (
    [(64, 64, 3, 3)] * 4
    + [(128, 64, 3, 3), (128, 128, 3, 3), (128, 64, 1, 1), (128, 128, 3, 3), (128, 128, 3, 3)]
    + [(256, 128, 3, 3), (256, 256, 3, 3), (256, 128, 1, 1), (256, 256, 3, 3), (256, 256, 3, 3)]
    + [(512, 256, 3, 3), (512, 512, 3, 3), (512, 256, 1, 1), (512, 512, 3, 3), (512, 512, 3, 3)]
)
"""Of one ResNet-18, without the first, which differs between audio and frames."""

VIT_B_BLOCK = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
VIT_B_NORMS = [(768,)] * 4
VIT_B = [(768, 3, 16, 16), (768,), (1, 197, 768)] + (VIT_B_BLOCK + VIT_B_NORMS) * 12


@dataclass(frozen=True)
class Gradients:
    """Shapes of the gradients of two modalities."""

    name: str
    shapes: tuple[tuple[Sequence[int], ...], tuple[Sequence[int], ...]]
    channels_last: bool = False
    """Whether those of four dimensions are laid out so, as the convolutions of such a model."""

    @property
    def modality(self) -> list[int]:
        """The modality of each gradient."""
        return [0] * len(self.shapes[0]) + [1] * len(self.shapes[1])

    @property
    def elements(self) -> int:
        """How many there are in all."""
        return sum(torch.Size(shape).numel() for part in self.shapes for shape in part)

    def make(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
        """Random gradients of the sizes that training gives."""
        generator = torch.Generator().manual_seed(seed)
        made = [
            (torch.randn(tuple(shape), generator=generator) * 1e-2).to(device, dtype)
            for part in self.shapes
            for shape in part
        ]
        if not self.channels_last:
            return made
        return [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in made]


AV_RESNET18 = (((64, 1, 7, 7), *RESNET18_CONVOLUTIONS), ((64, 3, 7, 7), *RESNET18_CONVOLUTIONS))

GRADIENTS = {
    each.name: each
    for each in (
        Gradients("av-resnet18", AV_RESNET18),
        Gradients("av-resnet18 channels_last", AV_RESNET18, channels_last=True),
        Gradients("tiny", (((1024,),) * 10, ((1024,),) * 10)),
        Gradients("many", (((4096,),) * 500, ((4096,),) * 500)),
        Gradients("vit-b-pair", (tuple(VIT_B), tuple(VIT_B))),
    )
}
"""`av-resnet18`: 40 convolutions, 22.3 M elements. `vit-b-pair`: 294 tensors, 172 M elements."""


@dataclass(frozen=True)
class Scoring:
    """Sizes of a batch of logits."""

    modalities: int
    batch: int
    classes: int

    @property
    def name(self) -> str:
        """As the results call it."""
        return f"score-{self.modalities}x{self.batch}x{self.classes}"

    def make(self, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """Random logits of each modality, and labels."""
        generator = torch.Generator().manual_seed(0)
        logits = [
            torch.randn(self.batch, self.classes, generator=generator).to(device, dtype)
            for _ in range(self.modalities)
        ]
        target = torch.randint(0, self.classes, (self.batch,), generator=generator)
        return logits, target.to(device)


SCORING = [
    Scoring(modalities, batch, classes)
    for modalities in (2, 3, 8)
    for batch, classes in ((64, 6), (64, 310), (64, 21000), (4096, 6), (4096, 310))
] + [Scoring(2, 4096, 21000)]
"""CREMA-D, VGGSound and ImageNet-21K have 6, 310 and 21 thousand classes."""


@dataclass(frozen=True)
class Features:
    """Sizes of a batch of features before their fusion."""

    batch: int
    widths: tuple[int, ...]

    @property
    def name(self) -> str:
        """As the results call it."""
        return f"drop-{self.batch}x{'+'.join(map(str, self.widths))}"

    @property
    def elements(self) -> int:
        """How many there are in all."""
        return self.batch * sum(self.widths)

    def make(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Random features of each modality."""
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(self.batch, width, generator=generator).to(device, dtype)
            for width in self.widths
        ]


FEATURES = [Features(256, (512, 512))]
"""What two ResNet-18s give."""
