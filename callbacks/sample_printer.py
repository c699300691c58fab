"""Print what the model says.

lit-stepwise fit --config configs/tiny.yaml --trainer.callbacks+=callbacks.sample_printer.SamplePrinter
"""

from __future__ import annotations

import lightning.pytorch as pl
from tqdm import tqdm

from lit_stepwise.types import Rollout, Trajectory


class SamplePrinter(pl.Callback):
    """Prints the first trajectories of every few iterations, turn by turn.

    Args:
        every_n_iterations: 1 prints in each.
        num_trajectories: of one iteration.
    """

    def __init__(self, every_n_iterations: int = 5, num_trajectories: int = 1) -> None:
        self.every_n_iterations = every_n_iterations
        self.num_trajectories = num_trajectories

    def on_rollout_end(self, rollout: Rollout) -> None:
        """Each rank has its own trajectories; print this rank's."""
        if rollout.stage == "train" and rollout.iteration % self.every_n_iterations == 0:
            for trajectory in rollout.trajectories[: self.num_trajectories]:
                tqdm.write(self._as_text(rollout.iteration, trajectory))

    @staticmethod
    def _as_text(iteration: int, trajectory: Trajectory) -> str:
        lines = [f"\niteration {iteration}, {trajectory.task_id}: reward {trajectory.reward:.2f}"]
        for number, turn in enumerate(trajectory.turns, start=1):
            lines.append(f"  {number} model  {turn.text.strip()}")
            if turn.feedback.observation:
                lines.append(f"    world  {' '.join(turn.feedback.observation.split())}")
        return "\n".join([*lines, f"  ended: {trajectory.stop_reason.value}"])
