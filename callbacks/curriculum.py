"""Play tasks less often that teach nothing: those that are always solved, and those that never are.

trainer:
  callbacks:
    - class_path: callbacks.curriculum.Curriculum
      init_args: {easy_weight: 0.25, hard_weight: 0.5, patience: 2}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lit_stepwise.errors import ConfigError
from lit_stepwise.types import Deal, Trajectory


class Curriculum(pl.Callback):
    """Weighs tasks by how the groups of their attempts ended the last times they were played.

    A group whose attempts all end alike has no advantage under ``GroupRelative`` and its like. A task whose last
    ``patience`` groups did is dealt out with a lower weight from then on, until one of its groups is mixed again. No
    weight is 0: a task that the policy has learnt may be forgotten, and one that it could not do may come within reach.

    It acts from the second time that a task's turn comes: in a run that sees each task once it does nothing, where
    ``rollout.filters.dynamic_sampling`` does. What it knows of an iteration acts on the next; with
    ``rollout.staleness`` so many iterations later. Tasks are told apart by ``task_id``. Logs ``rollout/tasks_easy`` and
    ``rollout/tasks_hard``, the numbers of tasks so weighed.

    Args:
        easy_weight: of a task that every attempt solved: the fraction of its turns that it keeps.
        hard_weight: of a task that no attempt solved.
        patience: groups in a row.
    """

    def __init__(self, easy_weight: float = 0.25, hard_weight: float = 0.5, patience: int = 2) -> None:
        for name, weight in {"easy_weight": easy_weight, "hard_weight": hard_weight}.items():
            if not 0 < weight <= 1:
                raise ConfigError(f"Curriculum {name}={weight} is not in (0, 1]; 1 plays such tasks like the others")
        if patience < 1:
            raise ConfigError(f"Curriculum patience={patience}; use 1 or more")
        self.easy_weight = easy_weight
        self.hard_weight = hard_weight
        self.patience = patience
        self.streaks: dict[str, int] = {}
        """Of each task the groups in a row that were solved throughout, or, below 0, not at all."""
        self._has_news = False

    def on_deal(self, deal: Deal) -> None:
        """Called alike on every rank, with a list that other callbacks may have changed."""
        deal.weights = [
            weight * self._weight(self.streaks.get(task.task_id, 0))
            for task, weight in zip(deal.tasks, deal.weights, strict=True)
        ]

    def on_selection(self, trajectories: Sequence[Trajectory]) -> None:
        """The trajectories of all ranks, in the order of groups: every rank learns the same."""
        groups: dict[int, list[Trajectory]] = {}
        for trajectory in trajectories:
            if not trajectory.failed:
                groups.setdefault(trajectory.group, []).append(trajectory)
        for attempts in groups.values():
            name, outcomes = attempts[0].task_id, {attempt.success for attempt in attempts}
            before = self.streaks.get(name, 0)
            if outcomes == {True}:
                self.streaks[name] = max(before, 0) + 1
            elif outcomes == {False}:
                self.streaks[name] = min(before, 0) - 1
            else:
                self.streaks[name] = 0
        self._has_news = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """With the first optimizer step of the iteration."""
        if self._has_news:
            easy = sum(streak >= self.patience for streak in self.streaks.values())
            hard = sum(-streak >= self.patience for streak in self.streaks.values())
            for logger in trainer.loggers:
                logger.log_metrics({"rollout/tasks_easy": easy, "rollout/tasks_hard": hard}, step=trainer.global_step)
        self._has_news = False

    def state_dict(self) -> dict[str, Any]:
        """What was learnt of the tasks, for a resumed run to deal out what it would have."""
        return {"streaks": dict(self.streaks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.streaks = dict(state_dict["streaks"])

    def _weight(self, streak: int) -> float:
        if abs(streak) < self.patience:
            return 1.0
        return self.easy_weight if streak > 0 else self.hard_weight
