"""Stop when the engine no longer plays the policy that is trained.

trainer:
callbacks:
- class_path: callbacks.logprob_gap_guard.LogprobGapGuard
init_args: {max_gap: 0.05, patience: 2}
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn


class LogprobGapGuard(pl.Callback):
    """Watches ``train/logprob_gap``, the mean |rollout - trainer| logprob in nats, and ends the run gracefully.

    A gap that grows means stale weights, another precision or another temperature; learning goes on for a while as if
    nothing were wrong, and then collapses.

    Args:
        max_gap: in nats. With ``mini_batches x passes > 1`` later steps differ by their updates, too: leave room.
        patience: optimizer steps in a row that may exceed it.
    """

    def __init__(self, max_gap: float = 0.05, patience: int = 1) -> None:
        self.max_gap = max_gap
        self.patience = patience
        self.num_bad_steps = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The module has just logged the gap of this step, over all ranks."""
        gap = float(trainer.callback_metrics["train/logprob_gap"])
        self.num_bad_steps = 0 if gap <= self.max_gap else self.num_bad_steps + 1
        if self.num_bad_steps >= self.patience:
            rank_zero_warn(
                f"train/logprob_gap={gap:.4f} at step {trainer.global_step} is above max_gap={self.max_gap} for "
                f"{self.num_bad_steps} steps; stopping"
            )
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Go on counting after a resume."""
        return {"num_bad_steps": self.num_bad_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting after a resume."""
        self.num_bad_steps = state_dict["num_bad_steps"]
