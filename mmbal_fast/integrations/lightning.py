"""OGM-GE as a callback for Lightning."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "mmbal_fast.integrations.lightning needs Lightning: pip install mmbal-fast[lightning]"
    ) from error

from mmbal_fast.integrations._callback import BalancerCallback


class OGMGECallback(BalancerCallback, Callback):
    """Balances the modalities of a ``LightningModule`` before every step of its optimizer.

    The module makes an `OGMGE` and hands over logits by ``self.balancer.observe(logits, target)``
    in ``training_step``, once per (micro-)batch. The callback does the rest: it modulates in
    ``on_before_optimizer_step``, so once per optimizer step under gradient accumulation, after
    unscaling and before clipping; it saves and loads the balancer's state with checkpoints; and
    every ``log_every_n_steps`` it gives scores, ratios and coefficients to the trainer's loggers,
    as ``modulation/ratio/<name>`` and so on. Between those steps nothing is read back to the host.

    With manual optimization it modulates before the first optimizer that steps after something was
    observed: call ``backward`` for all of them before.

    Args:
        balancer: the module's attribute that holds its `OGMGE`; default ``"balancer"``.
        epochs: modulate in so many first epochs, then train plainly; default all. The authors'
            code for OGM-GE (CVPR 2022) has 51.

    Raises:
        TypeError: when training begins, if the module does not hold an `OGMGE` there.
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

            Trainer(callbacks=[OGMGECallback()]).fit(Classifier(), loader)
    """

    def __init__(self, balancer: str = "balancer", *, epochs: int | None = None) -> None:
        super().__init__(balancer, epochs=epochs)
        self._pending_before = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the balancer."""
        self._begin(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switches modulation off after its epochs."""
        self._begin_epoch(trainer.current_epoch)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Modulates and logs."""
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
        """Refuses a module that observes in validation."""
        if not self._pending_before:
            self._refuse_pending()

    def state_dict(self) -> dict[str, Any]:
        """The balancer's."""
        return self._export()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps it until the balancer is known, where Lightning loads before it sets up."""
        self._import(state_dict)
