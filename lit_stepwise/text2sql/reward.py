"""What a turn of text-to-SQL earns."""

from __future__ import annotations

from dataclasses import dataclass

from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import Reward
from lit_stepwise.types import SQLTurn


@dataclass(frozen=True)
class ExecutionReward(Reward):
    """The result of the final answer decides; small costs on the way tell the turns apart.

    ::

        answer   correct | wrong       in the turn that gives the solution
                 unfinished            in the last turn, when it gives none
        format   format_error          in a turn without an action
        query    query_error           in a turn whose statement did not run, final answers included

    A statement that merely runs earns nothing: paying for that teaches to run statements, not to answer.
    """

    correct: float = 1.0
    """A solution whose result equals the gold result."""
    wrong: float = 0.0
    """Any other solution."""
    unfinished: float = -0.2
    """Out of turns without a solution; below ``wrong``, so that an attempt is better than none."""
    format_error: float = -0.2
    """A response without an action. The trajectory goes on, so it may come several times."""
    query_error: float = -0.1
    """A statement that ended in an error, was denied, or ran out of time or memory."""

    def __post_init__(self) -> None:
        if self.correct <= max(self.wrong, self.unfinished):
            raise ConfigError(
                f"rollout.environment.reward.correct={self.correct} is not above wrong={self.wrong} and "
                f"unfinished={self.unfinished}, so that being right would not pay; raise it"
            )

    def __call__(self, turn: SQLTurn) -> dict[str, float]:
        """``answer``, ``format`` and ``query`` of this turn."""
        answer = 0.0
        if turn.is_solution:
            answer = self.correct if turn.correct else self.wrong
        elif turn.last:
            answer = self.unfinished
        failed = turn.query is not None and turn.query.status != "ok"
        return {
            "answer": answer,
            "format": self.format_error if turn.format_error else 0.0,
            "query": self.query_error if failed else 0.0,
        }
