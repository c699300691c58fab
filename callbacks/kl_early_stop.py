"""Stop when the policy has moved too far.

trainer:
  callbacks:
    - class_path: callbacks.kl_early_stop.KLEarlyStop
      init_args: {max_kl: 0.1, patience: 3}
"""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lit_stepwise.errors import ConfigError
from lit_stepwise.training import StepwiseModule


class KLEarlyStop(pl.Callback):
    """Ends the run gracefully when an estimate of KL stays above a bound.

    ``train/rollout_kl`` is the distance from the weights that played: within an iteration it grows with every optimizer
    step, and beyond about 0.1 ratios say little. ``train/kl`` is the distance from the reference of ``model.kl``, which
    grows over the whole run; where the price is in the reward, it is measured once an iteration. The number of
    optimizer steps of an iteration is fixed, so that the run ends and no step is skipped; fewer of them
    (``data.passes``, ``data.mini_batches``) or a lower learning rate keep the former down.

    Args:
        max_kl: in nats.
        patience: optimizer steps in a row that may exceed it.
        metric: which of the two.
    """

    def __init__(
        self,
        max_kl: float = 0.1,
        patience: int = 3,
        metric: Literal["train/rollout_kl", "train/kl"] = "train/rollout_kl",
    ) -> None:
        self.max_kl = max_kl
        self.patience = patience
        self.metric = metric
        self.num_bad_steps = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises ``ConfigError`` for a metric that nobody will log."""
        assert isinstance(pl_module, StepwiseModule)
        if self.metric == "train/kl" and not pl_module.objective.kl.needs_reference:
            raise ConfigError(
                "KLEarlyStop metric=train/kl is not logged while model.kl.coefficient is 0; raise the coefficient, or "
                "use metric: train/rollout_kl"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The module has just logged the KL of this step, over all ranks, so that they all end together."""
        kl = trainer.callback_metrics.get(self.metric)
        if kl is None:  # a step without a token
            return
        self.num_bad_steps = 0 if kl <= self.max_kl else self.num_bad_steps + 1  # what is no number is bad, too
        if self.num_bad_steps >= self.patience:
            rank_zero_warn(
                f"{self.metric}={float(kl):.4f} at step {trainer.global_step} is above max_kl={self.max_kl} for "
                f"{self.num_bad_steps} steps; stopping"
            )
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Go on counting after a resume."""
        return {"num_bad_steps": self.num_bad_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting after a resume."""
        self.num_bad_steps = state_dict["num_bad_steps"]
