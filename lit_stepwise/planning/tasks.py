"""How many tasks there are, and how long their first prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_stepwise.errors import StepwiseError
from lit_stepwise.interfaces import Environment
from lit_stepwise.planning.assumptions import Assumptions
from lit_stepwise.rollout.rendering import ChatRenderer, History
from lit_stepwise.training.datamodule import TaskDataModule
from lit_stepwise.types import Limits, Message, Task

_MAX_LOOKED_AT = 64
"""Tasks whose prompts are made; each may run a statement."""
_TOKENS_PER_MESSAGE = 6
"""What a chat template writes around one, where there is no tokenizer."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Of the tasks of one split."""

    num_tasks: int
    num_dropped: int
    """Of them, how many have a first prompt over ``rollout.limits.max_prompt_tokens``, as far as was looked."""
    num_unplayable: int
    """Of those looked at, how many the environment refused."""
    prompt_tokens: int
    """Of the first prompts that are kept, in the mean."""
    longest: int
    source: str
    """Where the figures come from."""
    is_assumed: bool
    """No task was read."""

    @property
    def num_kept(self) -> int:
        """Tasks to be played."""
        return self.num_tasks - self.num_dropped


def survey(
    data: TaskDataModule,
    environment: Environment,
    limits: Limits,
    history: History,
    tokenizer: Any,
    assume: Assumptions,
    split: str = "train",
) -> Survey:
    """Read the tasks of a split where its files are there, and make the prompts of some of them.

    Raises ``ConfigError`` for a chat template that does not go with ``history``.
    """
    if absent := _absent(data, split):
        return _assumed(limits, assume, absent)
    try:
        tasks = data.read(split)
    except StepwiseError as error:
        return _assumed(limits, assume, str(error).partition("\n")[0])
    length, how = _measure(tokenizer, history, assume)
    lengths = _lengths(tasks, environment, limits, length)
    if not lengths:
        return _assumed(limits, assume, f"none of the first {_MAX_LOOKED_AT} tasks can be played")
    looked_at = min(len(tasks), _MAX_LOOKED_AT)
    kept = [each for each in lengths if each <= limits.max_prompt_tokens]
    return Survey(
        num_tasks=len(tasks),
        num_dropped=round(len(tasks) * (1 - len(kept) / len(lengths))),
        num_unplayable=looked_at - len(lengths),
        prompt_tokens=round(sum(kept) / len(kept)) if kept else limits.max_prompt_tokens,
        longest=max(lengths),
        source=f"{looked_at} of {len(tasks)} tasks, {how}",
        is_assumed=False,
    )


def count_validation(data: TaskDataModule) -> int | None:
    """Tasks of a validation; None where they cannot be read."""
    if not data.files["val"]:
        return 0
    try:
        return None if _absent(data, "val") else len(data.read("val"))
    except StepwiseError:
        return None


def _absent(data: TaskDataModule, split: str) -> str:
    """Which file of it is not there; a source whose files are no files may read them all the same."""
    given = data.files[split] or []
    files = [given] if isinstance(given, str) else given
    missing = [file for file in files if Path(file).suffix and not Path(file).exists()]
    return f"{missing[0]} is not there" if missing else ""


def _assumed(limits: Limits, assume: Assumptions, reason: str) -> Survey:
    tokens = assume.prompt_tokens if assume.prompt_tokens is not None else limits.max_prompt_tokens // 2
    return Survey(assume.num_tasks, 0, 0, tokens, limits.max_prompt_tokens, f"assumed: {reason}", True)


def _measure(tokenizer: Any, history: History, assume: Assumptions) -> tuple[Callable[[Sequence[Message]], int], str]:
    """Tokens of a conversation, and how they are counted."""
    if tokenizer is not None:
        renderer = ChatRenderer.of(tokenizer, history)
        return lambda messages: len(renderer.first_prompt(messages)), "by the tokenizer"

    def guess(messages: Sequence[Message]) -> int:
        chars = sum(len(message.content) for message in messages)
        return round(chars / assume.chars_per_token) + _TOKENS_PER_MESSAGE * len(messages)

    return guess, f"assumed {assume.chars_per_token} characters a token, since the tokenizer is not on this machine"


def _lengths(
    tasks: Sequence[Task], environment: Environment, limits: Limits, length: Callable[[Sequence[Message]], int]
) -> list[int]:
    """Of the first prompts of tasks that are spread over all of them; without those that cannot be played."""
    count = min(len(tasks), _MAX_LOOKED_AT)
    found = []
    try:
        for k in range(count):
            try:
                episode = environment.start(tasks[k * len(tasks) // count], limits.max_turns)
            except StepwiseError:
                continue
            found.append(length(episode.prompt()))
    finally:
        environment.close()
    return found
