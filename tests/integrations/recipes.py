"""The code of docs/integrations.md, run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import mmbal_fast
from tests.integrations import training

TEXT = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()


def recipe(name: str) -> str:
    """A code block by the word after its language."""
    (code,) = re.findall(rf"^```python {name}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return str(code)


class Model(nn.Module):
    """What the recipe for Accelerate expects: the test's network, giving unimodal logits."""

    def __init__(self) -> None:
        super().__init__()
        net = training.Net()
        self.encoders, self.head = net.encoders, net.head

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = {name: encoder(batch[name]) for name, encoder in self.encoders.items()}
        return mmbal_fast.nn.unimodal_logits(features, self.head)


def run_accelerate(batch_size: int) -> dict[str, Any]:
    """The names that the recipe leaves behind, from an epoch in batches of this many samples."""
    from accelerate import Accelerator

    model = Model()
    names: dict[str, Any] = {
        "Accelerator": Accelerator,
        "cross_entropy": cross_entropy,
        "mmbal_fast": mmbal_fast,
        "model": model,
        "optimizer": training.sgd(model),
        "loader": DataLoader(training.Digits(), batch_size),
    }
    exec(compile(recipe("accelerate"), "docs/integrations.md", "exec"), names)
    return names
