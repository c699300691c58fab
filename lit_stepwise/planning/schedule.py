"""How long a run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_stepwise.planning.tasks import count_validation
from lit_stepwise.rollout.callback import RolloutCallback
from lit_stepwise.training.datamodule import TaskDataModule


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often things happen; None where nothing ends them, or nobody knows."""

    num_iterations: int | None
    num_steps: int | None
    num_validations: int | None
    num_validation_trajectories: int | None
    """Of one."""


def schedule(trainer: Any, data: TaskDataModule, rollout: RolloutCallback, steps_per_iteration: int) -> Schedule:
    """By the bounds of the section ``trainer``."""
    epochs = 1000 if trainer.max_epochs is None and trainer.max_steps == -1 else trainer.max_epochs
    iterations = None if epochs in (None, -1) else int(epochs)
    if trainer.max_steps > -1:
        within = -(-trainer.max_steps // steps_per_iteration)
        iterations = within if iterations is None else min(iterations, within)
    steps = None if iterations is None else iterations * steps_per_iteration
    num_tasks = count_validation(data)
    attempts = len(rollout.evaluation.samplings(rollout.sampling))
    every = trainer.check_val_every_n_epoch or 1
    first = 1 if trainer.num_sanity_val_steps == -1 else 0
    return Schedule(
        num_iterations=iterations,
        num_steps=steps if trainer.max_steps < 0 or steps is None else min(steps, trainer.max_steps),
        num_validations=None if iterations is None else iterations // every + first,
        num_validation_trajectories=None if num_tasks is None else num_tasks * attempts,
    )
