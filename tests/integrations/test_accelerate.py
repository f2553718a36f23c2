"""The recipe for Accelerate, and the other code of docs/integrations.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mmbal_fast
from tests.integrations import recipes, training

pytest.importorskip("accelerate", reason="accelerate is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def plain_model() -> tuple[nn.Module, mmbal_fast.OGMGE]:
    """The recipe's training written out: 64 samples as 4 micro-batches of 16."""
    model = recipes.Model()
    balancer = mmbal_fast.OGMGE(model.encoders, alpha=0.8)
    optimizer = training.sgd(model)
    batches = list(torch.utils.data.DataLoader(training.Digits(), 16))
    for step in range(len(batches) // 4):
        for batch in batches[4 * step : 4 * step + 4]:
            logits = model(batch)
            balancer.observe(logits, batch["labels"])
            fused = logits["gray"] + logits["color"]
            (nn.functional.cross_entropy(fused, batch["labels"]) / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        balancer.step()
        optimizer.step()
        optimizer.zero_grad()
    return model, balancer


def test_the_recipe_trains_as_the_plain_loop() -> None:
    names = recipes.run_accelerate(batch_size=16)
    model, balancer = plain_model()
    assert names["balancer"].state_dict() == balancer.state_dict()
    assert names["balancer"].state_dict()["step"] == 4
    assert torch.equal(training.parameters(names["model"]), training.parameters(model))
    assert names["balancer"].last is not None
    assert names["balancer"].last.coefficients.min() < 1


def test_the_recipe_saves_and_loads_the_balancer(tmp_path: Path) -> None:
    names = recipes.run_accelerate(batch_size=16)
    names["accelerator"].save_state(str(tmp_path))
    saved = names["balancer"].state_dict()
    names["balancer"].load_state_dict({**saved, "seed": 9, "step": 0, "enabled": False})
    names["accelerator"].load_state(str(tmp_path))
    assert names["balancer"].state_dict() == saved


def test_the_recipe_for_the_history_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.chdir(tmp_path)
    net = training.Net()

    def train_step(batch: dict[str, Tensor]) -> None:
        net(**batch)["loss"].backward()
        net.balancer.step()

    names = {
        "mmbal_fast": mmbal_fast,
        "SummaryWriter": SummaryWriter,
        "balancer": net.balancer,
        "loader": torch.utils.data.DataLoader(training.Digits(), 64),
        "train_step": train_step,
    }
    exec(compile(recipes.recipe("history"), "docs/integrations.md", "exec"), names)
    assert Path("modulation.png").stat().st_size > 10_000
    assert list(Path("runs/1").iterdir())
