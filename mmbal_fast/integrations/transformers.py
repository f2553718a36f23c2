"""The methods as a callback for the Trainer of Hugging Face Transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

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

from mmbal_fast.integrations._callback import MethodCallback


class BalancingCallback(MethodCallback, TrainerCallback, ExportableState):
    """Steps the method of a model before every step of the Trainer's optimizer.

    The model makes a `Method` and hands over what it needs in ``forward``: logits by
    ``self.balancer.observe(logits, labels)`` in training only, for a gradient modulation;
    ``self.balancer.loss`` and ``record`` for `GradientBlending`, in training as ``"train"`` and in
    evaluation as ``"validation"``; nothing for `GreedyBalancing`. The callback does the rest: it
    steps the method in ``on_pre_optimizer_step``, so once per optimizer step under gradient
    accumulation, after unscaling and after clipping; after an evaluation it ends
    Gradient-Blending's super-epoch; it saves and loads the method's state with checkpoints; and it
    adds what the method measured to what the Trainer logs, as ``balance/ratios/<name>`` and so on.
    Between those steps nothing is read back to the host.

    Args:
        method: the model's attribute that holds its `Method`; default ``"balancer"``.
        epochs: enable it in so many first epochs, then train plainly; default all. The authors'
            code for OGM-GE (CVPR 2022) has 51.

    Raises:
        TypeError: when training begins, if the model does not hold a `Method` there, or if it is
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
            BalancingCallback().add_to(trainer)
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
        """Finds the method and loads its state where training resumes."""
        if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            raise TypeError(
                "BalancingCallback: the model must not run in nn.DataParallel; start the script "
                f"with torchrun, or show it one GPU (got {args.n_gpu})"
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
        """Switches the method off after its epochs."""
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
        """Steps the method."""
        # Accelerate's wrapper has the scaler, and the scaler knows the optimizer within.
        scaler = getattr(optimizer, "scaler", None)
        self._step(state.global_step, scaler, getattr(optimizer, "optimizer", optimizer))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Ends a super-epoch."""
        self._end_validation()

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
            "args": {"method": self._attribute, "epochs": self._epochs},
            "attributes": {"_saved": _plain(self._export())},
        }


def _plain(state: Any) -> Any:
    """Numbers and lists, as JSON has them."""
    if isinstance(state, Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return state
