"""Step samples of the lengths that play would give them, with tokens that are alike only where play's would be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from lit_stepwise.rollout.rendering import History
from lit_stepwise.rollout.samples import Rows, joined
from lit_stepwise.types import Limits, StepSample

_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, are spread evenly however many there are."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of the turns of a trajectory, in tokens."""

    prompt: int
    """The first prompt."""
    response: int
    thought: int
    """Of a response, what ``strip_think`` leaves out of later prompts."""
    observation: int
    """What stands between two responses, the tokens of the chat template included."""
    turns: float
    """In the mean; an attempt has the number below or above it."""


def worst_lengths(limits: Limits, history: History, thought_fraction: float) -> Lengths:
    """Every budget is used up: turns, the first prompt and responses, and the last turn fills the context.

    What the environment says is given the room that is left, in equal parts.
    """
    response = min(limits.max_new_tokens, limits.max_context_tokens - 1)
    prompt = min(limits.max_prompt_tokens, limits.max_context_tokens - response)
    thought = int(thought_fraction * response)
    remembered = response - thought if history == "strip_think" else response
    later = limits.max_turns - 1
    room = limits.max_context_tokens - prompt - response - later * remembered
    return Lengths(prompt, response, thought, max(room // later, 1) if later else 0, limits.max_turns)


def step_samples(
    lengths: Lengths, limits: Limits, history: History, rows: Rows, num_groups: int, samples_per_task: int
) -> list[StepSample]:
    """Of so many groups, as the agent loop would play them within ``limits``."""
    unused = count()
    samples: list[StepSample] = []
    for group in range(num_groups):
        prompt = _fresh(unused, lengths.prompt)
        for attempt in range(samples_per_task):
            share = (group * samples_per_task + attempt) * _GOLDEN % 1.0
            num_turns = int(lengths.turns + share)
            turns = list(_turns(lengths, limits, history, prompt, num_turns, unused, group, attempt))
            samples += turns if rows == "step" else joined(turns)
    return samples


def filler(num_tokens: int, first_token: int, group: int) -> StepSample:
    """A sample that shares nothing with others, all of it sampled but its first token."""
    tokens = list(range(first_token, first_token + num_tokens))
    return _sample(tokens[:1], tokens[1:], group, 0, 0)


def _turns(
    lengths: Lengths,
    limits: Limits,
    history: History,
    prompt: list[int],
    num_turns: int,
    unused: Iterator[int],
    group: int,
    attempt: int,
) -> Iterator[StepSample]:
    for turn in range(num_turns):
        room = limits.max_context_tokens - len(prompt)
        if room < 1:
            return
        response = _fresh(unused, min(lengths.response, room))
        yield _sample(prompt, response, group, attempt, turn)
        remembered = response[lengths.thought :] if history == "strip_think" else response
        prompt = [*prompt, *remembered, *_fresh(unused, lengths.observation)]


def _fresh(unused: Iterator[int], num_tokens: int) -> list[int]:
    return [next(unused) for _ in range(num_tokens)]


def _sample(prompt: list[int], response: list[int], group: int, attempt: int, turn: int) -> StepSample:
    zeros = [0.0] * len(response)
    return StepSample(
        prompt_ids=prompt,
        response_ids=response,
        response_mask=[True] * len(response),
        rollout_logprobs=zeros,
        advantages=zeros,
        reward=0.0,
        group=group,
        sample=attempt,
        turn=turn,
        policy_version=0,
    )
