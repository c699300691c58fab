"""What a run would have played and learnt: three tasks, worked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_stepwise.store.write import StoredPhase, TrajectoryStore
from lit_stepwise.types import Feedback, MiniBatch, StepSample, StopReason, Trajectory, Turn, VersionSpan


def turn(token: int, reward: float, done: bool = False, success: bool = False) -> Turn:
    feedback = Feedback(
        observation="" if done else f"saw {token}",
        rewards={"format": reward / 4, "outcome": reward * 3 / 4},
        done=done,
        success=success,
        details={"sql": f"select {token}", "status": "ok", "rows": token * 2},
    )
    return Turn(
        prompt_ids=[token, token + 1, token + 2],
        response_ids=[token + 3, token + 4],
        rollout_logprobs=[-0.5, -0.25],
        versions=[VersionSpan(12, 1), VersionSpan(11, 1)],
        text=f"said {token}",
        feedback=feedback,
        environment_seconds=0.125,
        engine_seconds=1.5,
        num_cached_tokens=1,
    )


GOOD = Trajectory("a", 0, 0, [turn(10, 1.0), turn(20, 2.0, done=True, success=True)], StopReason.DONE, 0.75)
BAD = Trajectory("a", 0, 1, [turn(30, 0.0)], StopReason.MAX_TURNS, 0.75)
LOST = Trajectory("b", 1, 0, [], StopReason.FAILED, 0.75, failure="disk full")
EASY = Trajectory("b", 1, 1, [turn(40, 4.0, done=True, success=True)], StopReason.DONE, 0.75)
GREEDY = Trajectory("v", 0, 0, [turn(50, 8.0, done=True, success=True)], StopReason.DONE, 0.0)


def row(trajectory: Trajectory, index: int) -> StepSample:
    """A turn as a training row."""
    mine = trajectory.turns[index]
    size = len(mine.response_ids)
    return StepSample(
        mine.prompt_ids, mine.response_ids, [True] * size, mine.rollout_logprobs, [0.5] * size, mine.reward,
        trajectory.group, trajectory.sample, index, policy_version=11,
    )  # fmt: skip


def train(store: TrajectoryStore, iteration: int, trajectories: Sequence[Trajectory] = (GOOD, BAD, LOST, EASY)) -> Path:
    """Play an iteration that leaves the second group out."""
    advantages = [[0.1 * (t + 1) for t in range(len(each.turns))] for each in trajectories]
    left_out = ["failed" if each.failed else "uniform" if each.group else "" for each in trajectories]
    return store.write(StoredPhase("train", 11, trajectories, iteration, advantages, left_out))


def learn(store: TrajectoryStore, iteration: int, step: int, logprobs: Sequence[float], pass_index: int = 0) -> None:
    """Train the first turn of the first trajectory."""
    store.learn(MiniBatch([row(GOOD, 0)], iteration, 0, pass_index), {0: logprobs}, step)
