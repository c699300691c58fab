"""Read trajectories in W&B or TensorBoard: of every iteration the best, the worst, and some at random.

trainer:
  logger:
    class_path: lightning.pytorch.loggers.WandbLogger
    init_args: {project: lit-stepwise, offline: true}
  callbacks:
    - class_path: callbacks.trajectory_table.TrajectoryTable
      init_args: {best: 1, worst: 1, random: 2}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lit_stepwise.errors import ConfigError
from lit_stepwise.types import Trajectory


class Table(NamedTuple):
    """One row per turn."""

    columns: list[str]
    rows: list[list[Any]]


class TrajectoryTable(pl.Callback):
    """Logs a table ``trajectories`` once an iteration, with a row for each turn of the trajectories it picks.

    A logger gets it that has ``log_table``, as W&B's has; TensorBoard gets it as text. Trajectories that failed by our
    fault are passed over.

    Args:
        best: how many of the highest reward.
        worst: of the lowest.
        random: of the others.
        every_n_iterations: 1 logs each.
        max_characters: of a response or an observation; what is longer is cut.
    """

    def __init__(
        self, best: int = 1, worst: int = 1, random: int = 2, every_n_iterations: int = 1, max_characters: int = 2000
    ) -> None:
        self.best = best
        self.worst = worst
        self.random = random
        self.every_n_iterations = every_n_iterations
        self.max_characters = max_characters
        self._table: Table | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises ``ConfigError`` where no logger takes a table."""
        if stage == "fit" and not any(_takes_table(logger) or _takes_text(logger) for logger in trainer.loggers):
            names = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "false"
            raise ConfigError(
                f"trainer.logger={names} takes no table of trajectories; add a WandbLogger or TensorBoardLogger, or "
                "leave the callback TrajectoryTable out"
            )

    def on_selection(
        self, iteration: int, trajectories: Sequence[Trajectory], advantages: Sequence[Sequence[float]]
    ) -> None:
        """The trajectories of all ranks; no hook of training yet, so that the table is kept for one."""
        if iteration % self.every_n_iterations == 0:
            self._table = self._tabulate(iteration, trajectories, advantages)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first optimizer step of the iteration."""
        if self._table is not None and trainer.is_global_zero:
            for logger in trainer.loggers:
                _log(logger, self._table, trainer.global_step)
        self._table = None

    def _tabulate(
        self, iteration: int, trajectories: Sequence[Trajectory], advantages: Sequence[Sequence[float]]
    ) -> Table:
        components = sorted({name for trajectory in trajectories for name in trajectory.reward_components})
        rows: list[list[Any]] = []
        for index, pick in self._picks(iteration, trajectories).items():
            trajectory = trajectories[index]
            for number, (turn, advantage) in enumerate(zip(trajectory.turns, advantages[index], strict=True)):
                rewards = [turn.feedback.rewards.get(name) for name in components]
                texts = [self._cut(turn.text), self._cut(turn.feedback.observation)]
                place = [iteration, pick, trajectory.task_id, trajectory.sample, number]
                rows.append([*place, *texts, *rewards, advantage, trajectory.stop_reason.value])
        names = [f"reward_{name}" for name in components]
        head = ["iteration", "pick", "task", "sample", "turn", "response", "observation"]
        return Table([*head, *names, "advantage", "ended"], rows)

    def _picks(self, iteration: int, trajectories: Sequence[Trajectory]) -> dict[int, str]:
        """Index of each trajectory that is shown, and why; none twice, and a function of the iteration alone."""
        sound = [index for index, each in enumerate(trajectories) if not each.failed]
        ranked = sorted(sound, key=lambda index: -trajectories[index].reward)
        best, rest = ranked[: self.best], ranked[self.best :]
        worst = rest[::-1][: self.worst]
        others = sorted(rest[: len(rest) - len(worst)])
        drawn = np.random.default_rng(iteration).permutation(len(others))[: self.random]
        return {
            **dict.fromkeys(best, "best"),
            **dict.fromkeys(worst, "worst"),
            **{others[int(place)]: "random" for place in drawn},
        }

    def _cut(self, text: str) -> str:
        return text if len(text) <= self.max_characters else f"{text[: self.max_characters]} ..."


def _takes_table(logger: Logger) -> bool:
    return hasattr(logger, "log_table")


def _takes_text(logger: Logger) -> bool:
    return isinstance(logger, TensorBoardLogger)


def _log(logger: Any, table: Table, step: int) -> None:
    if _takes_table(logger):
        logger.log_table("trajectories", columns=table.columns, data=table.rows, step=step)
    elif _takes_text(logger):
        logger.experiment.add_text("trajectories", _as_markdown(table), step)


def _as_markdown(table: Table) -> str:
    """Each turn as a block that is shown as it is, whatever the model wrote."""
    blocks = []
    for row in table.rows:
        lines = [f"{name}: {value}" for name, value in zip(table.columns, row, strict=True)]
        blocks.append("\n".join(f"    {line}" for text in lines for line in text.splitlines()))
    return "\n\n---\n\n".join(blocks)
