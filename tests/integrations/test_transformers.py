"""Training with the Trainer of Transformers, compared with the plain loop bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import ParallelMode

from mmbal_fast.integrations.transformers import BalancingCallback
from tests.host_reads import host_reads
from tests.integrations import training
from tests.integrations.training import Digits, Net

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Reporter(TrainerCallback):
    """Stands for TensorBoard's: added by the Trainer before the user's callbacks."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.setdefault(state.global_step, {}).update(logs)


def make_trainer(net: nn.Module, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": training.BATCH,
        "per_device_eval_batch_size": 256,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    optimizer = training.sgd(net)
    return Trainer(
        net,
        arguments,
        train_dataset=Digits(),
        eval_dataset=Digits(),
        optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"num_train_epochs": 2, "eval_strategy": "epoch"}, {"epochs": 2}),
        ({"gradient_accumulation_steps": 4}, {"accumulate": 4}),
        ({"max_grad_norm": 0.05}, {"clip_before": 0.05}),
    ],
    ids=["plain", "accumulation", "clipping"],
)
def test_trains_as_the_plain_loop(
    tmp_path: Path, options: dict[str, Any], plain: dict[str, Any]
) -> None:
    net, callback = Net(), BalancingCallback()
    make_trainer(net, tmp_path, callback, **options).train()
    expected = Net()
    history = training.train_plainly(expected, **plain)
    assert torch.equal(training.table(callback.history), training.table(history))
    assert torch.equal(training.parameters(net), training.parameters(expected))


def test_modulates_at_all(tmp_path: Path) -> None:
    net, callback = Net(), BalancingCallback()
    make_trainer(net, tmp_path, callback).train()
    assert training.table(callback.history)[:, 5:].min() < 1
    plain = Net(alpha=0.0)
    plain.balancer.noise = 0.0
    training.train_plainly(plain)
    assert not torch.equal(training.parameters(net), training.parameters(plain))


@pytest.mark.parametrize("by_transformers", [False, True])
def test_resumes_from_a_checkpoint_bit_by_bit(tmp_path: Path, by_transformers: bool) -> None:
    options = {
        "num_train_epochs": 2,
        "save_strategy": "epoch",
        "restore_callback_states_from_checkpoint": by_transformers,
    }
    straight, callback = Net(), BalancingCallback()
    make_trainer(straight, tmp_path, callback, **options).train()
    resumed, again = Net(), BalancingCallback()
    trainer = make_trainer(resumed, tmp_path, again, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert resumed.balancer.state_dict() == straight.balancer.state_dict()
    assert resumed.balancer.state_dict()["step"] == 16
    assert torch.equal(training.parameters(resumed), training.parameters(straight))
    if not by_transformers:  # which puts a new callback in the place of this one
        assert again.history is not None
        assert again.history.to_dict()["step"] == list(range(8, 16))


def test_resumes_from_a_checkpoint_without_the_callback(tmp_path: Path) -> None:
    make_trainer(Net(), tmp_path, save_strategy="epoch").train()
    net = Net()
    net(**Digits()[torch.arange(9)])  # by hand, to see that it runs: forgotten
    trainer = make_trainer(
        net, tmp_path, BalancingCallback(), save_strategy="epoch", num_train_epochs=2
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    saved = json.loads((tmp_path / "checkpoint-16" / "trainer_state.json").read_text())
    state = saved["stateful_callbacks"]["BalancingCallback"]["attributes"]["_saved"]
    assert state == net.balancer.state_dict()
    assert state["step"] == 8


def test_logs_with_the_trainer(tmp_path: Path) -> None:
    net, callback, reporter = Net(), BalancingCallback(), Reporter()
    trainer = make_trainer(net, tmp_path, reporter, logging_steps=3, eval_strategy="epoch")
    callback.add_to(trainer)
    trainer.train()
    assert callback.history is not None
    table = callback.history.to_dict()
    history = {int(row["step"]): row for row in trainer.state.log_history if "loss" in row}
    reported = {step: row for step, row in reporter.rows.items() if "loss" in row}
    assert list(history) == list(reported) == [3, 6]
    for rows in (history, reported):
        for step, row in rows.items():
            assert row["balance/ratios/gray"] == table["ratios/gray"][step - 1]
            assert row["balance/coefficients/color"] == table["coefficients/color"][step - 1]
    other = [row for row in trainer.state.log_history if "loss" not in row]
    assert other
    assert not any("balance/ratios/gray" in row for row in other)


def test_reads_the_device_only_to_log(tmp_path: Path) -> None:
    counts = []

    class BalancingCallbackThatCounts(BalancingCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            with host_reads() as found:
                super().on_step_begin(*args, **kwargs)
            counts.append(len(found))

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            with host_reads() as found:
                super().on_pre_optimizer_step(*args, **kwargs)
            counts.append(len(found))

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            with host_reads() as found:
                super().on_log(*args, **kwargs)
            counts.append(len(found))

    make_trainer(Net(), tmp_path, BalancingCallbackThatCounts(), logging_steps=4).train()
    assert [count > 0 for count in counts] == ([False] * 8 + [True]) * 2 + [False]


def test_modulates_in_the_first_epochs_only(tmp_path: Path) -> None:
    callback = BalancingCallback(epochs=1)
    make_trainer(Net(), tmp_path, callback, num_train_epochs=2).train()
    coefficients = training.table(callback.history)[:, 5:]
    assert coefficients.shape[0] == 16
    assert coefficients[:8].min() < 1
    assert bool((coefficients[8:] == 1).all())


def test_refuses_a_model_without_balancer(tmp_path: Path) -> None:
    trainer = make_trainer(Net(), tmp_path, BalancingCallback("balance"))
    with pytest.raises(TypeError, match=r"must hold its method as 'balance' .*got a Net"):
        trainer.train()


def test_refuses_a_model_that_never_observes(tmp_path: Path) -> None:
    class Silent(Net):
        def forward(self, gray: Tensor, color: Tensor, labels: Tensor) -> dict[str, Tensor]:
            training, self.training = self.training, False
            out = super().forward(gray, color, labels)
            self.training = training
            return out

    with pytest.raises(RuntimeError, match=r"needs scores, from observe\(\)"):
        make_trainer(Silent(), tmp_path, BalancingCallback()).train()


def test_refuses_a_model_that_observes_in_evaluation(tmp_path: Path) -> None:
    net = Net(observes_in_evaluation=True)
    options = {"num_train_epochs": 2, "eval_strategy": "epoch"}
    with pytest.raises(RuntimeError, match="observe must be called in training only"):
        make_trainer(net, tmp_path, BalancingCallback(), **options).train()


def test_refuses_data_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "parallel_mode", ParallelMode.NOT_DISTRIBUTED)
    with pytest.raises(TypeError, match=r"must not run in nn\.DataParallel; start .* torchrun"):
        make_trainer(Net(), tmp_path, BalancingCallback()).train()


def test_refuses_what_was_flattened(tmp_path: Path) -> None:
    net = Net()
    weight = next(net.encoders.parameters())
    weight._fsdp_flattened = True  # type: ignore[attr-defined]  # as FSDP1 does
    with pytest.raises(TypeError, match="must not be flattened by FullyShardedDataParallel"):
        make_trainer(net, tmp_path, BalancingCallback()).train()
