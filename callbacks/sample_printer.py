"""Print what the model says.

trainer:
  callbacks:
    - class_path: callbacks.sample_printer.SamplePrinter
      init_args: {every_n_iterations: 5, num_trajectories: 2}
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from lit_stepwise.types import Trajectory


class SamplePrinter(pl.Callback):
    """Prints the first trajectories of every few iterations, turn by turn, with what each turn was worth.

    Whatever the model writes stays text: characters that would move the cursor, change colours or turn the direction
    of writing are shown by their codes.

    Args:
        every_n_iterations: 1 prints in each.
        num_trajectories: of one iteration.
        max_characters: of a response or an observation; what is longer is cut.
    """

    def __init__(self, every_n_iterations: int = 5, num_trajectories: int = 1, max_characters: int = 2000) -> None:
        self.every_n_iterations = every_n_iterations
        self.num_trajectories = num_trajectories
        self.max_characters = max_characters

    @rank_zero_only
    def on_selection(
        self, iteration: int, trajectories: Sequence[Trajectory], advantages: Sequence[Sequence[float]]
    ) -> None:
        """The trajectories of all ranks, printed once."""
        if iteration % self.every_n_iterations == 0:
            for trajectory, values in list(zip(trajectories, advantages, strict=True))[: self.num_trajectories]:
                tqdm.write(self._as_text(iteration, trajectory, values))

    def _as_text(self, iteration: int, trajectory: Trajectory, advantages: Sequence[float]) -> str:
        lines = [f"\niteration {iteration}, {printable(trajectory.task_id)}: reward {trajectory.reward:.2f}"]
        for number, (turn, advantage) in enumerate(zip(trajectory.turns, advantages, strict=True), start=1):
            lines.append(f"  {number} model  {self._shown(turn.text)}")
            if turn.feedback.observation:
                lines.append(f"    world  {self._shown(turn.feedback.observation)}")
            lines.append(f"    reward {turn.reward:.2f}, advantage {advantage:+.2f}")
        return "\n".join([*lines, f"  ended: {trajectory.stop_reason.value}"])

    def _shown(self, text: str) -> str:
        text = text.strip()
        cut = text if len(text) <= self.max_characters else f"{text[: self.max_characters]} ..."
        return "\n           ".join(printable(line) for line in cut.split("\n"))


def printable(line: str) -> str:
    r"""The same with ``\x1b`` and the like in place of every character that a terminal would obey and not show."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
