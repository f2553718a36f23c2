"""The loop of the released OGM-GE code, transcribed as literally as its description allows.

Two modalities, audio first and concatenated: one sample at a time, in Python, read by the host, a
tensor at a time, convolutions only, parameters found by a piece of their name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
    softmax, relu, tanh = nn.Softmax(dim=1), nn.ReLU(), nn.Tanh()
    weight, bias, width = model.fusion.weight, model.fusion.bias, a.size(1)
    out_a = torch.mm(a, torch.transpose(weight[:, :width], 0, 1)) + bias / 2
    out_v = torch.mm(v, torch.transpose(weight[:, width:], 0, 1)) + bias / 2

    score_v = sum(softmax(out_v)[i][label[i]] for i in range(out_v.size(0)))
    score_a = sum(softmax(out_a)[i][label[i]] for i in range(out_a.size(0)))
    ratio_v = score_v / score_a
    ratio_a = 1 / ratio_v
    coeff_a: float | Tensor
    coeff_v: float | Tensor
    if ratio_v > 1:
        coeff_v = 1 - tanh(alpha * relu(ratio_v))
        coeff_a = 1
    else:
        coeff_a = 1 - tanh(alpha * relu(ratio_a))
        coeff_v = 1

    for name, parms in model.named_parameters():
        layer = name.split(".")[0]
        for modality, coeff in (("audio", coeff_a), ("visual", coeff_v)):
            if modality in layer and len(parms.grad.size()) == 4:
                g = parms.grad
                if modulation == "OGM_GE":
                    noise = torch.zeros_like(g).normal_(0, g.std().item() + 1e-8)
                    parms.grad = (g * coeff + noise).detach()
                elif modulation == "OGM":
                    parms.grad = (g * coeff).detach()
    measured = (score_a, score_v, coeff_a, coeff_v)
    return Published(*(torch.as_tensor(each).detach().item() for each in measured))
