"""Methods of other kinds than OGM-GE in the frameworks, against the plain loop."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import mmbal_fast
from mmbal_fast.nn import MMTM
from tests.integrations import training
from tests.integrations.training import BATCH, Digits

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:blending_weights. no head gained"),
]
SIZES = {"gray": 64, "color": 192}
EPOCHS = 3


class Blended(nn.Module):
    """A head for each modality and one for both, weighed by Gradient-Blending."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoders = nn.ModuleDict(
            {name: training.Net.encoder(size) for name, size in SIZES.items()}
        )
        self.heads = nn.ModuleDict({name: nn.Linear(16, 10) for name in SIZES})
        self.head = nn.Linear(32, 10)
        self.balancer = mmbal_fast.GradientBlending([*SIZES, "fused"])

    def forward(self, gray: Tensor, color: Tensor, labels: Tensor) -> dict[str, Tensor]:
        features = {"gray": self.encoders["gray"](gray), "color": self.encoders["color"](color)}
        logits = {name: self.heads[name](each) for name, each in features.items()}
        logits["fused"] = self.head(torch.cat(list(features.values()), dim=1))
        loss = self.balancer.loss(logits, labels)
        self.balancer.record("train" if self.training else "validation", self.balancer.last)
        return {"loss": loss, "logits": logits["fused"]}


class Greedy(nn.Module):
    """Two branches joined by an MMTM."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.gray = nn.ModuleList([nn.Linear(64, 16), nn.Linear(16, 10)])
        self.color = nn.ModuleList([nn.Linear(192, 16), nn.Linear(16, 10)])
        self.mmtm = MMTM([16, 16])
        self.balancer = mmbal_fast.GreedyBalancing(self, warmup_steps=2, epsilon=0.0, window=3)

    def forward(self, gray: Tensor, color: Tensor, labels: Tensor) -> dict[str, Tensor]:
        one, other = self.mmtm(self.gray[0](gray.flatten(1)), self.color[0](color.flatten(1)))
        logits = self.gray[1](one.tanh()), self.color[1](other.tanh())
        loss = cross_entropy(logits[0], labels) + cross_entropy(logits[1], labels)
        return {"loss": loss, "logits": (logits[0] + logits[1]) / 2}


def trained_plainly(kind: type) -> Any:
    net = kind()
    optimizer = training.sgd(net)
    for _ in range(EPOCHS):
        net.train()
        for batch in DataLoader(Digits(), BATCH):
            net(**batch)["loss"].backward()
            if kind is Greedy:
                net.balancer.step()
            optimizer.step()
            optimizer.zero_grad()
        net.eval()
        with torch.no_grad():
            for batch in DataLoader(Digits(), 256):
                net(**batch)
        if kind is Blended:
            net.balancer.update()
    return net


def acts(net: Any) -> bool:
    """Whether the method has done more than watch."""
    if isinstance(net, Blended):
        return not torch.allclose(net.balancer.weights, torch.full((3,), 1 / 3).double())
    return bool((net.balancer.log.rebalanced >= 0).any())


@pytest.mark.parametrize("kind", [Blended, Greedy])
def test_lightning(kind: type, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    from lightning.pytorch import LightningModule, Trainer

    from mmbal_fast.integrations.lightning import BalancingCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = kind()
            self.balancer = self.net.balancer

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss: Tensor = self.net(**batch)["loss"]
            return loss

        def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
            self.net(**batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return training.sgd(self.net)

    module, callback = Module(), BalancingCallback()
    trainer = Trainer(
        max_epochs=EPOCHS,
        num_sanity_val_steps=1,  # what it records must not count
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(Digits(), BATCH), DataLoader(Digits(), 256))
    expected = trained_plainly(kind)
    assert acts(expected)
    assert torch.equal(training.parameters(module.net), training.parameters(expected))
    assert repr(module.balancer.state_dict()) == repr(expected.balancer.state_dict())
    assert callback.history is not None
    assert len(callback.history) == EPOCHS * 256 // BATCH
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again, second = Module(), BalancingCallback()
    later = Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[second],
    )  # fmt: skip
    later.fit(
        again,
        DataLoader(Digits(), BATCH),
        DataLoader(Digits(), 256),
        ckpt_path=tmp_path / "last.ckpt",
        weights_only=False,
    )
    assert repr(again.balancer.state_dict()) == repr(expected.balancer.state_dict())


@pytest.mark.parametrize("kind", [Blended, Greedy])
def test_transformers(kind: type, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from mmbal_fast.integrations.transformers import BalancingCallback
    from tests.integrations.test_transformers import make_trainer

    net, callback = kind(), BalancingCallback()
    trainer = make_trainer(
        net,
        tmp_path,
        callback,
        num_train_epochs=EPOCHS,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=4,
    )
    trainer.train()
    expected = trained_plainly(kind)
    assert torch.equal(training.parameters(net), training.parameters(expected))
    assert repr(net.balancer.state_dict()) == repr(expected.balancer.state_dict())
    quantity = "weights/fused" if kind is Blended else "speed/gray"
    assert any(f"balance/{quantity}" in row for row in trainer.state.log_history)
    resumed = kind()
    trainer = make_trainer(resumed, tmp_path, BalancingCallback(), num_train_epochs=EPOCHS)
    trainer.train(resume_from_checkpoint=True)
    assert repr(resumed.balancer.state_dict()) == repr(expected.balancer.state_dict())


@pytest.mark.parametrize("kind", [Blended, Greedy])
def test_accelerate(kind: type, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    net = kind()
    balancer = net.balancer
    model, optimizer, loader = accelerator.prepare(
        net, training.sgd(net), DataLoader(Digits(), BATCH)
    )
    accelerator.register_for_checkpointing(balancer)
    for _ in range(EPOCHS):
        model.train()
        for batch in loader:
            accelerator.backward(model(**batch)["loss"])
            if kind is Greedy:
                balancer.step(grad_scaler=accelerator.scaler, optimizer=optimizer)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            for batch in DataLoader(Digits(), 256):
                model(**batch)
        if kind is Blended:
            balancer.update()
    expected = trained_plainly(kind)
    assert torch.equal(training.parameters(net), training.parameters(expected))
    accelerator.save_state(str(tmp_path))
    state = balancer.state_dict()
    balancer.load_state_dict({**state, "enabled": False})
    accelerator.load_state(str(tmp_path))
    assert repr(balancer.state_dict()) == repr(state)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("made_in", ["__init__", "init_module"])
def test_true_precisions_of_lightning(precision: Any, made_in: str) -> None:
    """They change the default dtype while the module is made, and in every step."""
    pytest.importorskip("lightning", reason="lightning is not installed")
    from lightning.pytorch import Trainer

    from mmbal_fast.integrations.lightning import BalancingCallback
    from tests.integrations.test_lightning import Module

    callback = BalancingCallback()
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
        precision=precision,
    )  # fmt: skip
    if made_in == "init_module":
        with trainer.init_module():
            module = Module()
    else:
        module = Module()
    trainer.fit(module, DataLoader(Digits(), BATCH))
    assert module.balancer.state_dict()["step"] == 256 // BATCH
    last = module.balancer.last
    assert last.coefficients.dtype == torch.float32
    assert float(last.coefficients.min()) < 1
