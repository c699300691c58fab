"""A card index: one card a person, a question that takes one to three of them, and one answer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_stepwise.errors import DataError
from lit_stepwise.interfaces import Environment, Episode, TaskSource
from lit_stepwise.types import Feedback, Message, Task

ACTION = re.compile(r"<(look|answer)>(.*?)</\1>")
REMINDER = "Write <look>name</look> or <answer>city</answer>."


@dataclass(frozen=True, slots=True, kw_only=True)
class CardTask(Task):
    """One line of a file of tasks."""

    question: str
    answer: str
    cards: dict[str, str]
    """By name: what the card of this person says."""


class CardTasks(TaskSource):
    """Files with one task a line, as JSON objects."""

    def read(self, file: str) -> list[Task]:
        """All tasks of ``file``."""
        tasks: list[Task] = []
        for number, line in enumerate(Path(file).read_text().splitlines(), start=1):
            try:
                tasks.append(CardTask(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise DataError(f"{file}:{number}: {error}; a task has task_id, question, answer and cards") from error
        return tasks


class CardIndex(Environment):
    """Look at cards, then answer."""

    stop = ("</look>", "</answer>")
    offers_state_keys = True

    def __init__(self, look_cost: float = 0.02) -> None:
        """Settings only.

        Args:
            look_cost: What a look costs; the right answer pays 1.
        """
        self.look_cost = look_cost

    def start(self, task: Task, max_turns: int) -> Episode:
        """Begin a fresh attempt."""
        assert isinstance(task, CardTask)
        return CardEpisode(task, self.look_cost, max_turns)


class CardEpisode(Episode):
    """One attempt: what has been seen so far, and how many turns are left."""

    def __init__(self, task: CardTask, look_cost: float, max_turns: int) -> None:
        self.task = task
        self.look_cost = look_cost
        self.turns_left = max_turns
        self.seen: set[str] = set()

    def prompt(self) -> Sequence[Message]:
        """The question alone: the model was taught the protocol."""
        return [Message("user", self.task.question)]

    def step(self, response: str) -> Feedback:
        """Show a card, take the answer, or say what can be done."""
        self.turns_left -= 1
        found = ACTION.search(response)
        if found is None:
            return Feedback(REMINDER, {"format": -0.1}, format_error=True, state_key=self.state())
        action, word = found.groups()
        if action == "answer":
            right = word == self.task.answer
            return Feedback("", {"answer": float(right)}, done=True, success=right)
        self.seen.add(word)
        card = self.task.cards.get(word, f"There is no card of {word}.")
        return Feedback(card, {"look": -self.look_cost}, state_key=self.state())

    def state(self) -> str:
        """What is known, and how many turns are left to use it."""
        return f"{self.turns_left} {sorted(self.seen)}"
