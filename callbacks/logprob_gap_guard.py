"""Step more carefully, or stop, when the engine no longer plays the policy that is trained.

trainer:
  callbacks:
    - class_path: callbacks.logprob_gap_guard.LogprobGapGuard
      init_args: {max_gap: 0.05, patience: 2, action: lower_lr, factor: 0.5, max_lowerings: 2}
"""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lit_stepwise.errors import ConfigError


class LogprobGapGuard(pl.Callback):
    """Watches ``train/logprob_gap``, the mean |rollout - trainer| logprob in nats, and ends the run gracefully.

    A gap that grows means stale weights, another precision or another temperature; learning goes on for a while as if
    nothing were wrong, and then collapses. With several optimizer steps an iteration, or with ``rollout.staleness``, it
    may also mean steps that are too large: those a lower learning rate mends.

    The learning rate is multiplied for the time of each optimizer step alone, so that any scheduler goes on
    undisturbed: what acts is ``train/lr`` times ``train/lr_factor``.

    Args:
        max_gap: in nats. With ``mini_batches x passes > 1`` later steps differ by their updates, too: leave room.
        patience: optimizer steps in a row that may exceed it.
        action: stop, or lower_lr and go on.
        factor: of the learning rate, each time that it is lowered.
        max_lowerings: of the learning rate; the next time the run stops.
    """

    def __init__(
        self,
        max_gap: float = 0.05,
        patience: int = 1,
        action: Literal["stop", "lower_lr"] = "stop",
        factor: float = 0.5,
        max_lowerings: int = 3,
    ) -> None:
        if not 0 < factor < 1:
            raise ConfigError(f"LogprobGapGuard factor={factor} lowers no learning rate; use e.g. 0.5")
        self.max_gap = max_gap
        self.patience = patience
        self.action = action
        self.factor = factor
        self.max_lowerings = max_lowerings
        self.num_bad_steps = 0
        self.num_lowerings = 0
        self._scheduled: list[Any] = []

    @property
    def lr_factor(self) -> float:
        """What the learning rate is multiplied by now."""
        return float(self.factor**self.num_lowerings)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stand on both sides of every optimizer step."""
        if self.action == "lower_lr":
            for optimizer in trainer.optimizers:
                optimizer.register_step_pre_hook(self._lower)
                optimizer.register_step_post_hook(self._restore)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The module has just logged the gap of this step, over all ranks, so that they all act together."""
        if self.action == "lower_lr":
            pl_module.log("train/lr_factor", self.lr_factor, batch_size=1)
        gap = trainer.callback_metrics.get("train/logprob_gap")
        if gap is None:  # a step without a token
            return
        self.num_bad_steps = 0 if gap <= self.max_gap else self.num_bad_steps + 1  # what is no number is bad, too
        if self.num_bad_steps >= self.patience:
            self._act(trainer, float(gap))

    def _act(self, trainer: pl.Trainer, gap: float) -> None:
        said = (
            f"train/logprob_gap={gap:.4g} at step {trainer.global_step} is above max_gap={self.max_gap} for "
            f"{self.num_bad_steps} steps"
        )
        if self.action == "lower_lr" and self.num_lowerings < self.max_lowerings:
            self.num_lowerings += 1
            self.num_bad_steps = 0
            rank_zero_warn(f"{said}; the learning rate is {self.lr_factor:g} of the scheduled one from here on")
        else:
            rank_zero_warn(f"{said}; stopping")
            trainer.should_stop = True

    def _lower(self, optimizer: Optimizer, *_: Any) -> None:
        self._scheduled = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.lr_factor

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, self._scheduled, strict=True):
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Go on counting after a resume."""
        return {"num_bad_steps": self.num_bad_steps, "num_lowerings": self.num_lowerings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting after a resume."""
        self.num_bad_steps = state_dict["num_bad_steps"]
        self.num_lowerings = state_dict["num_lowerings"]
