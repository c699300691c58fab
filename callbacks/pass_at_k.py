"""pass@k from the attempts that training plays anyway.

trainer:
  callbacks:
    - class_path: callbacks.pass_at_k.PassAtK
      init_args: {ks: [1, 2, 4]}
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lit_stepwise.errors import ConfigError
from lit_stepwise.rollout import RolloutCallback
from lit_stepwise.training import pass_at
from lit_stepwise.types import Trajectory


class PassAtK(pl.Callback):
    """Logs ``rollout/pass_at_<k>`` once an iteration: the chance that one of k attempts solves a task of it.

    It costs nothing, and says what ``rollout/accuracy`` cannot: accuracy that rises while pass@k falls is a policy that
    repeats itself. Unbiased, over the groups of all rounds of play, those that the filters left out included. It is of
    the tasks that were played, at the temperature of training, while the policy changes from one iteration to the next;
    ``rollout.evaluation.samples_per_task`` gives ``val/pass_at_<k>`` of held-out tasks.

    Args:
        ks: each at most ``rollout.samples_per_task``.
    """

    def __init__(self, ks: Sequence[int] = (1, 2, 4)) -> None:
        self.ks = sorted(set(ks))
        self._values: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises ``ConfigError`` for a k that no group has attempts for."""
        rollout = next(each for each in trainer.callbacks if isinstance(each, RolloutCallback))  # type: ignore[attr-defined]
        if not self.ks or not 1 <= self.ks[0] <= self.ks[-1] <= rollout.samples_per_task:
            raise ConfigError(
                f"PassAtK ks={self.ks} with rollout.samples_per_task={rollout.samples_per_task}; use numbers from 1 to "
                "that, or raise samples_per_task"
            )

    def on_selection(self, trajectories: Sequence[Trajectory]) -> None:
        """The trajectories of all ranks, equal on each."""
        groups: dict[int, list[Trajectory]] = defaultdict(list)
        for trajectory in trajectories:
            groups[trajectory.group].append(trajectory)
        found = [pass_at(attempts, self.ks) for attempts in groups.values()]
        for k in self.ks:
            values = [passes[k] for passes in found if k in passes]
            if values:
                self._values[f"rollout/pass_at_{k}"] = sum(values) / len(values)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """With the first optimizer step of the iteration."""
        if self._values:
            pl_module.log_dict(self._values, logger=False, batch_size=1)  # for ModelCheckpoint.monitor
            for logger in trainer.loggers:
                logger.log_metrics(self._values, step=trainer.global_step)
        self._values = {}
