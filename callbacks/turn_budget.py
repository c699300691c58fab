"""Give conversations few turns at first, and more as training goes on.

trainer:
  callbacks:
    - class_path: callbacks.turn_budget.TurnBudget
      init_args: {first_max_turns: 2, num_iterations: 20}
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lit_stepwise.errors import ConfigError
from lit_stepwise.rollout import RolloutCallback
from lit_stepwise.types import Deal


class TurnBudget(pl.Callback):
    """Trajectories of iteration 0 have ``first_max_turns`` turns at most; the number grows to that of the limits.

    ``rollout.limits.max_turns`` is the end of the schedule, so that what is checked at start holds all along;
    evaluation plays with it from the first. Everything is a function of the iteration: there is no state, and an
    iteration that is played ahead of training (``rollout.staleness``) has its own number. Logs ``rollout/max_turns``.

    Args:
        first_max_turns: in iteration 0.
        num_iterations: after so many the number is that of the limits.
    """

    def __init__(self, first_max_turns: int = 2, num_iterations: int = 20) -> None:
        if num_iterations < 1:
            raise ConfigError(f"TurnBudget num_iterations={num_iterations}; use 1 or more")
        self.first_max_turns = first_max_turns
        self.num_iterations = num_iterations

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises ``ConfigError`` where there is nothing to grow to."""
        self.last_max_turns = _rollout_of(trainer).limits.max_turns
        if not 1 <= self.first_max_turns <= self.last_max_turns:
            raise ConfigError(
                f"TurnBudget first_max_turns={self.first_max_turns} cannot grow to rollout.limits.max_turns="
                f"{self.last_max_turns}; use 1 to that, or raise that"
            )

    def on_deal(self, deal: Deal) -> None:
        """Called alike on every rank, before the iteration is played."""
        deal.max_turns = min(deal.max_turns, self.max_turns(deal.iteration))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Of the iteration in training, which is not the one in play where that runs ahead."""
        pl_module.log("rollout/max_turns", float(self.max_turns(batch.iteration)), batch_size=1)

    def max_turns(self, iteration: int) -> int:
        """Rounded down."""
        grown = min(iteration, self.num_iterations)
        return self.first_max_turns + (self.last_max_turns - self.first_max_turns) * grown // self.num_iterations


def _rollout_of(trainer: pl.Trainer) -> RolloutCallback:
    return next(each for each in trainer.callbacks if isinstance(each, RolloutCallback))  # type: ignore[attr-defined]
