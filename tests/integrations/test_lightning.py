"""Training with Lightning, compared with the plain loop bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision

from mmbal_fast.integrations.lightning import BalancingCallback
from tests.host_reads import host_reads
from tests.integrations import training
from tests.integrations.training import Digits, Net

pytestmark = [
    # Hints on workers and on how to call Lightning's newest names, in Lightning and torch.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Module(LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net = Net(**options)
        self.balancer = self.net.balancer

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.net(**batch)["loss"]
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.net(**batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return training.sgd(self.net)


class Sink(Logger):
    """Keeps what it is given."""

    name, version = "sink", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, Any]] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        assert step is not None
        self.rows.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def fit(
    module: LightningModule,
    callback: BalancingCallback,
    *,
    resume: Path | None = None,
    validate: bool = False,
    **options: Any,
) -> Trainer:
    """A trainer that has trained for an epoch, or as the options say."""
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    callbacks = [callback, *options.pop("callbacks", [])]
    trainer = Trainer(callbacks=callbacks, **{**defaults, **options})
    loader = DataLoader(Digits(), training.BATCH)
    trainer.fit(module, loader, loader if validate else None, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"max_epochs": 2}, {"epochs": 2}),
        ({"accumulate_grad_batches": 4}, {"accumulate": 4}),
        ({"gradient_clip_val": 0.05}, {"clip_after": 0.05}),
    ],
    ids=["plain", "accumulation", "clipping"],
)
def test_trains_as_the_plain_loop(options: dict[str, Any], plain: dict[str, Any]) -> None:
    module, callback = Module(), BalancingCallback()
    fit(module, callback, validate=True, **options)
    net = Net()
    history = training.train_plainly(net, **plain)
    assert torch.equal(training.table(callback.history), training.table(history))
    assert torch.equal(training.parameters(module.net), training.parameters(net))


def test_forgets_what_was_observed_before_training() -> None:
    module, callback = Module(), BalancingCallback()
    module.net(**Digits()[torch.arange(9)])  # by hand, to see that it runs
    fit(module, callback, validate=True)
    net = Net()
    training.train_plainly(net)
    assert torch.equal(training.parameters(module.net), training.parameters(net))


def test_modulates_at_all() -> None:
    # The tests against the plain loop would pass with a balancer that does nothing.
    module, callback = Module(), BalancingCallback()
    fit(module, callback)
    assert callback.history is not None
    table = callback.history.to_dict()
    assert min(table["coefficients/gray"] + table["coefficients/color"]) < 1
    plain = Net(alpha=0.0)
    plain.balancer.noise = 0.0
    training.train_plainly(plain)
    assert not torch.equal(training.parameters(module.net), training.parameters(plain))


def test_resumes_from_a_checkpoint_bit_by_bit(tmp_path: Path) -> None:
    straight, callback = Module(), BalancingCallback()
    fit(straight, callback, max_epochs=2)
    first = fit(Module(), BalancingCallback(), max_epochs=1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, again = Module(), BalancingCallback()
    fit(resumed, again, max_epochs=2, resume=tmp_path / "half.ckpt")
    assert torch.equal(training.parameters(resumed), training.parameters(straight))
    assert again.history is not None
    assert again.history.to_dict()["step"] == list(range(8, 16))
    assert resumed.balancer.state_dict() == straight.balancer.state_dict()


def test_goes_on_where_it_was_in_a_second_fit() -> None:
    module, callback = Module(), BalancingCallback()
    fit(module, callback)
    fit(module, callback)
    assert module.balancer.state_dict()["step"] == 16
    assert callback.history is not None
    assert len(callback.history) == 16


def test_logs_at_the_trainers_interval() -> None:
    sink, callback = Sink(), BalancingCallback()
    fit(Module(), callback, logger=sink, log_every_n_steps=3)
    assert callback.history is not None
    table = callback.history.to_dict()
    logged = {step: row for step, row in sink.rows.items() if "balance/ratios/gray" in row}
    assert list(logged) == [2, 5]
    for step, row in logged.items():
        for name, column in table.items():
            if name != "step":
                assert row[f"balance/{name}"] == column[step]


def test_reads_the_device_only_to_log() -> None:
    counts = []

    class Counting(BalancingCallback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            with host_reads() as found:
                super().on_before_optimizer_step(*args)
            counts.append(len(found))

    fit(Module(), Counting(), logger=Sink(), log_every_n_steps=4)
    assert [count > 0 for count in counts] == [False, False, False, True] * 2


def test_modulates_in_the_first_epochs_only() -> None:
    callback = BalancingCallback(epochs=1)
    fit(Module(), callback, max_epochs=2)
    coefficients = training.table(callback.history)[:, 5:]
    assert coefficients.shape[0] == 16
    assert coefficients[:8].min() < 1
    assert bool((coefficients[8:] == 1).all())


def test_leaves_out_steps_that_the_scaler_skips() -> None:
    # The first scale overflows float16, and halves until it does not.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-14)  # type: ignore[attr-defined]
    module, callback = Module(), BalancingCallback()
    before = []

    class Watch(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            before.append(training.parameters(module.net))

    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(module, callback, plugins=[plugin], callbacks=[Watch()])
    skipped = sum(torch.equal(a, b) for a, b in zip([parameters0(), *before], before, strict=False))
    assert 0 < skipped < 8
    assert module.balancer.state_dict()["step"] == 8 - skipped
    assert callback.history is not None
    assert len(callback.history) == 8 - skipped
    assert bool(training.parameters(module.net).isfinite().all())


def parameters0() -> Tensor:
    return training.parameters(Net())


def test_steps_once_for_several_optimizers() -> None:
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            optimizers: Any = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss: Tensor = self.net(**batch)["loss"]
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            return [training.sgd(each) for each in (self.net.encoders, self.net.head)]

    module, callback = Manual(), BalancingCallback()
    fit(module, callback)
    net = Net()
    training.train_plainly(net)
    assert torch.equal(training.parameters(module.net), training.parameters(net))


def test_leaves_out_a_batch_that_the_module_leaves_out() -> None:
    class Choosy(Module):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor | None:  # type: ignore[override]
            return None if index == 3 else super().training_step(batch, index)

    module, callback = Choosy(), BalancingCallback()
    fit(module, callback)
    assert module.balancer.state_dict()["step"] == 7


def test_refuses_a_module_without_balancer() -> None:
    with pytest.raises(TypeError, match=r"must hold its method as 'balance' .*got a Module"):
        fit(Module(), BalancingCallback("balance"))


def test_refuses_a_module_that_never_observes() -> None:
    class Silent(Module):
        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            self.net.eval()
            loss: Tensor = self.net(**batch)["loss"]
            return loss

    with pytest.raises(RuntimeError, match=r"needs scores, from observe\(\)"):
        fit(Silent(), BalancingCallback())


def test_refuses_a_module_that_observes_in_validation() -> None:
    with pytest.raises(RuntimeError, match=r"observe must be called in training only"):
        fit(Module(observes_in_evaluation=True), BalancingCallback(), validate=True)


def test_refuses_what_the_strategy_flattened() -> None:
    module = Module()
    weight = next(module.net.encoders.parameters())
    weight._fsdp_flattened = True  # type: ignore[attr-defined]  # as FSDP1 does
    with pytest.raises(TypeError, match="must not be flattened by FullyShardedDataParallel"):
        fit(module, BalancingCallback())
