"""Trajectories to step samples."""

from __future__ import annotations

from collections.abc import Sequence

from lit_stepwise.interfaces import Advantage
from lit_stepwise.types import StepSample, Trajectory


def assign_credit(trajectories: Sequence[Trajectory], advantage: Advantage) -> list[list[float]]:
    """An advantage for every turn of every trajectory; a failed one is kept out of its group and gets zeros."""
    sound = advantage([trajectory for trajectory in trajectories if not trajectory.failed])
    values = iter(sound)
    return [[0.0] * len(each.turns) if each.failed else next(values) for each in trajectories]


def step_samples(trajectories: Sequence[Trajectory], advantages: Sequence[Sequence[float]]) -> list[StepSample]:
    """One sample for every turn of every trajectory that did not fail, in order."""
    return [
        StepSample(
            prompt_ids=turn.prompt_ids,
            response_ids=turn.response_ids,
            rollout_logprobs=turn.rollout_logprobs,
            reward=turn.reward,
            advantage=value,
            group=trajectory.group,
            sample=trajectory.sample,
            turn=index,
            policy_version=turn.policy_version,
            temperature=trajectory.temperature,
        )
        for trajectory, values in zip(trajectories, advantages, strict=True)
        if not trajectory.failed
        for index, (turn, value) in enumerate(zip(trajectory.turns, values, strict=True))
    ]
