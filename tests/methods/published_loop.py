"""The loop of the released OGM-GE code, which the benchmark times too, around a small network.

Two modalities, audio first and concatenated; convolutions only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmbal_fast.bench._baselines import published_coefficients, published_update_


class AudioVisual(nn.Module):
    """Small enough for a test; convolutions, norms and biases, and features of unequal width."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.audio_net = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 20, 3, stride=2, bias=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.visual_net = nn.Sequential(
            nn.Conv2d(3, 8, 5),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.fusion = nn.Linear(20 + 12, classes)

    def forward(self, audio: Tensor, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, v = self.audio_net(audio), self.visual_net(visual)
        return a, v, self.fusion(torch.cat([a, v], dim=1))


@dataclass
class Published:
    score_a: float
    score_v: float
    coeff_a: float
    coeff_v: float


def published_step(
    model: AudioVisual, a: Tensor, v: Tensor, label: Tensor, *, alpha: float, modulation: str
) -> Published:
    """What happens between ``loss.backward()`` and ``optimizer.step()``."""
    weight, bias, width = model.fusion.weight, model.fusion.bias, a.size(1)
    out_a = torch.mm(a, torch.transpose(weight[:, :width], 0, 1)) + bias / 2
    out_v = torch.mm(v, torch.transpose(weight[:, width:], 0, 1)) + bias / 2

    (score_a, score_v), (coeff_a, coeff_v) = published_coefficients(
        [out_a.detach(), out_v.detach()], label, alpha
    )
    modality = {"audio_net": 0, "visual_net": 1}
    grads, owners = [], []
    for name, parms in model.named_parameters():
        layer = name.split(".")[0]
        if layer in modality and len(parms.grad.size()) == 4:
            grads.append(parms.grad)
            owners.append(modality[layer])
    published_update_(grads, [coeff_a, coeff_v], owners, noise=modulation == "OGM_GE")
    return Published(score_a, score_v, coeff_a, coeff_v)
