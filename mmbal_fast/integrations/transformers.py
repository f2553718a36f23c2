"""OGM-GE as a callback for the Trainer of Hugging Face Transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from transformers.trainer_callback import ExportableState
    from transformers.training_args import ParallelMode
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "mmbal_fast.integrations.transformers needs Transformers: "
        "pip install mmbal-fast[transformers]"
    ) from error

from mmbal_fast.integrations._callback import BalancerCallback


class OGMGECallback(BalancerCallback, TrainerCallback, ExportableState):
    """Balances the modalities of a model before every step of the Trainer's optimizer.

    The model makes an `OGMGE` and hands over logits by ``self.balancer.observe(logits, labels)`` in
    ``forward``, in training only. The callback does the rest: it modulates in
    ``on_pre_optimizer_step``, so once per optimizer step under gradient accumulation, after
    unscaling and after clipping; it saves and loads the balancer's state with checkpoints; and it
    adds scores, ratios and coefficients to what the Trainer logs, as ``modulation/ratio/<name>``
    and so on. Between those steps nothing is read back to the host.

    Args:
        balancer: the model's attribute that holds its `OGMGE`; default ``"balancer"``.
        epochs: modulate in so many first epochs, then train plainly; default all. The authors'
            code for OGM-GE (CVPR 2022) has 51.

    Raises:
        TypeError: when training begins, if the model does not hold an `OGMGE` there, or if it is
            to run in ``nn.DataParallel``.
        RuntimeError: when training goes on, if nothing was observed or if evaluation observed.

    Example:
        A model, and its trainer::

            class Classifier(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.encoders = nn.ModuleDict({"audio": ..., "image": ...})
                    self.head = nn.Linear(1024, 6)
                    self.balancer = mmbal_fast.OGMGE(self.encoders, alpha=0.8)

                def forward(self, audio, image, labels):
                    features = {"audio": self.encoders["audio"](audio), "image": ...}
                    logits = mmbal_fast.nn.unimodal_logits(features, self.head)
                    if self.training:
                        self.balancer.observe(logits, labels)
                    fused = sum(logits.values())
                    return {"loss": cross_entropy(fused, labels), "logits": fused}

            trainer = Trainer(Classifier(), arguments, train_dataset=dataset)
            OGMGECallback().add_to(trainer)
            trainer.train()
    """

    def add_to(self, trainer: Trainer) -> None:
        """Adds the callback to a Trainer, ahead of those that report to TensorBoard and others.

        Given as ``Trainer(callbacks=[...])`` it comes after them, works, and its numbers go to the
        Trainer's log history, but not to the reports.
        """
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Finds the balancer and loads its state where training resumes."""
        if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            raise TypeError(
                "OGMGECallback: the model must not run in nn.DataParallel; start the script with "
                f"torchrun, or show it one GPU (got {args.n_gpu})"
            )
        assert model is not None
        exported: Any = state.stateful_callbacks
        # A checkpoint without the callback lacks its entry, which the Trainer writes to.
        entry = exported.setdefault(type(self).__name__, self.state())
        self._import(entry["attributes"]["_saved"])
        self._begin(model)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Switches modulation off after its epochs."""
        self._begin_epoch(int(state.epoch or 0))

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuses a model that observes in evaluation."""
        self._refuse_pending()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Modulates."""
        # Accelerate's wrapper has the scaler, and the scaler knows the optimizer within.
        scaler = getattr(optimizer, "scaler", None)
        self._step(state.global_step, scaler, getattr(optimizer, "optimizer", optimizer))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the last step's numbers to the logs of training."""
        if logs is not None and "loss" in logs and state.is_world_process_zero:
            values = self._values()
            logs.update(values)
            state.log_history[-1].update(values)

    def state(self) -> dict[str, Any]:
        """What the Trainer writes to ``trainer_state.json`` with every checkpoint."""
        return {
            "args": {"balancer": self._attribute, "epochs": self._epochs},
            "attributes": {"_saved": self._export()},
        }
