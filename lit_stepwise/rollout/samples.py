"""Trajectories to training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from lit_stepwise.interfaces import Advantage
from lit_stepwise.types import StepSample, Trajectory, Turn

Rows = Literal["step", "trajectory"]
"""``step``: every turn is a row of its own; ``trajectory``: all turns of an attempt are one, as in most trainers."""


def assign_credit(trajectories: Sequence[Trajectory], advantage: Advantage) -> list[list[float]]:
    """An advantage for every turn of every trajectory; a failed one is kept out of its group and gets zeros."""
    sound = advantage([trajectory for trajectory in trajectories if not trajectory.failed])
    values = iter(sound)
    return [[0.0] * len(each.turns) if each.failed else next(values) for each in trajectories]


def step_samples(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[Sequence[float]],
    rows: Rows = "step",
    trained: Sequence[bool] | None = None,
) -> list[StepSample]:
    """The rows of every trajectory that did not fail, in order; each sampled token is trained in exactly one of them.

    ``trained`` says which trajectories make rows, if not all. A turn whose prompt does not continue the one before (a
    chat template that strips old thoughts) begins a new row under ``trajectory`` too.
    """
    samples: list[StepSample] = []
    wanted = trained if trained is not None else [True] * len(trajectories)
    for trajectory, values, is_wanted in zip(trajectories, advantages, wanted, strict=True):
        if trajectory.failed or not is_wanted:
            continue
        turns = [_row(trajectory, index, value) for index, value in enumerate(values)]
        samples += turns if rows == "step" else joined(turns)
    return samples


def with_component(turn: Turn, name: str, reward: float) -> Turn:
    """The same turn with one more component in its reward."""
    return replace(turn, feedback=replace(turn.feedback, rewards={**turn.feedback.rewards, name: reward}))


def _row(trajectory: Trajectory, index: int, advantage: float) -> StepSample:
    turn = trajectory.turns[index]
    num_tokens = len(turn.response_ids)
    return StepSample(
        prompt_ids=turn.prompt_ids,
        response_ids=turn.response_ids,
        response_mask=[True] * num_tokens,
        rollout_logprobs=turn.rollout_logprobs,
        advantages=_token_advantages(turn, advantage),
        reward=turn.reward,
        group=trajectory.group,
        sample=trajectory.sample,
        turn=index,
        policy_version=turn.policy_version,
        temperature=trajectory.temperature,
    )


def _token_advantages(turn: Turn, advantage: float) -> list[float]:
    """Token rewards are added unscaled: they say what is wrong with these very tokens, whatever the others did."""
    if not turn.token_rewards:
        return [advantage] * len(turn.response_ids)
    return [advantage + reward for reward in turn.token_rewards]


def joined(turns: Sequence[StepSample]) -> list[StepSample]:
    """One row for as many turns of a trajectory as continue each other."""
    rows: list[StepSample] = []
    for turn in turns:
        whole = [*rows[-1].prompt_ids, *rows[-1].response_ids] if rows else []
        if rows and list(turn.prompt_ids[: len(whole)]) == whole:
            rows[-1] = _continued(rows[-1], turn, len(turn.prompt_ids) - len(whole))
        else:
            rows.append(turn)
    return rows


def _continued(row: StepSample, following: StepSample, num_between: int) -> StepSample:
    """``row`` with another turn behind it, and ``num_between`` tokens of the environment between them."""
    between = following.prompt_ids[len(following.prompt_ids) - num_between :]
    return replace(
        row,
        response_ids=[*row.response_ids, *between, *following.response_ids],
        response_mask=[*row.response_mask, *[False] * num_between, *following.response_mask],
        rollout_logprobs=[*row.rollout_logprobs, *[0.0] * num_between, *following.rollout_logprobs],
        advantages=[*row.advantages, *[0.0] * num_between, *following.advantages],
        reward=row.reward + following.reward,
    )
