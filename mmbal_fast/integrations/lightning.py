"""The methods as a callback for Lightning."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "mmbal_fast.integrations.lightning needs Lightning: pip install mmbal-fast[lightning]"
    ) from error

from mmbal_fast.integrations._callback import MethodCallback


class BalancingCallback(MethodCallback, Callback):
    """Steps the method of a ``LightningModule`` before every step of its optimizer.

    The module makes a `Method` and hands over what it needs in ``training_step``, once per
    (micro-)batch: logits by ``self.balancer.observe(logits, target)`` for a gradient modulation;
    ``self.balancer.loss`` for `GradientBlending`, and its ``record`` in ``training_step`` and
    ``validation_step``; nothing for `GreedyBalancing`. The callback does the rest: it steps the
    method in ``on_before_optimizer_step``, so once per optimizer step under gradient accumulation,
    after unscaling and before clipping; after a validation it ends Gradient-Blending's super-epoch;
    it saves and loads the method's state with checkpoints; and every ``log_every_n_steps`` it gives
    what the method measured to the trainer's loggers, as ``balance/ratios/<name>`` and so on.
    Between those steps nothing is read back to the host.

    With manual optimization it steps before the first optimizer that steps after something was
    observed: call ``backward`` for all of them before.

    Args:
        method: the module's attribute that holds its `Method`; default ``"balancer"``.
        epochs: enable it in so many first epochs, then train plainly; default all. The authors'
            code for OGM-GE (CVPR 2022) has 51.

    Raises:
        TypeError: when training begins, if the module does not hold a `Method` there.
        RuntimeError: when training goes on, if nothing was observed or if validation observed.

    Example:
        A module, and its trainer::

            class Classifier(LightningModule):
                def __init__(self):
                    super().__init__()
                    self.encoders = nn.ModuleDict({"audio": ..., "image": ...})
                    self.head = nn.Linear(1024, 6)
                    self.balancer = mmbal_fast.OGMGE(self.encoders, alpha=0.8)

                def training_step(self, batch, _):
                    features = {name: self.encoders[name](batch[name]) for name in self.encoders}
                    logits = mmbal_fast.nn.unimodal_logits(features, self.head)
                    self.balancer.observe(logits, batch["label"])
                    return cross_entropy(sum(logits.values()), batch["label"])

            Trainer(callbacks=[BalancingCallback()]).fit(Classifier(), loader)
    """

    def __init__(self, method: str = "balancer", *, epochs: int | None = None) -> None:
        super().__init__(method, epochs=epochs)
        self._pending_before = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the method."""
        self._begin(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switches the method off after its epochs."""
        self._begin_epoch(trainer.current_epoch)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Steps the method and logs."""
        step = trainer.global_step
        self._step(step, getattr(trainer.precision_plugin, "scaler", None), optimizer)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.is_global_zero and every > 0 and (step + 1) % every == 0:
            values = self._values()
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remembers whether validation comes between two micro-batches."""
        self._pending_before = self._pending

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a module that observes in validation; ends a super-epoch."""
        if not self._pending_before:
            self._refuse_pending()
        if trainer.sanity_checking:
            self._forget()
        else:
            self._end_validation()

    def state_dict(self) -> dict[str, Any]:
        """The method's."""
        return self._export()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps it until the method is known, where Lightning loads before it sets up."""
        self._import(state_dict)
