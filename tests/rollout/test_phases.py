"""Rounds of play as one."""

from __future__ import annotations

from dataclasses import replace

from lit_stepwise.rollout.phases import joined
from lit_stepwise.types import Rollout, StopReason, Trajectory


def trajectory(group: int) -> Trajectory:
    return Trajectory(f"task-{group}", group, 0, (), StopReason.MAX_TURNS)


def test_rounds_of_play_add_up() -> None:
    first = Rollout(
        "train", 3, 7, [trajectory(0)], 1.0, 2.0, 4.0, 8.0, num_cached_tokens=16, environment_stats={"kills": 32.0}
    )
    second = Rollout(
        "train",
        3,
        7,
        [trajectory(1)],
        0.5,
        0.25,
        0.125,
        0.0625,
        num_cached_tokens=3,
        environment_stats={"kills": 5.0, "hits": 6.0},
        engine_failure="it died",
    )
    both = joined(first, second)
    assert [each.group for each in both.trajectories] == [0, 1]
    assert (both.engine_seconds, both.environment_seconds, both.sync_seconds, both.play_seconds) == (
        1.5,
        2.25,
        4.125,
        8.0625,
    )
    assert joined(replace(first, engine_seconds=None), replace(second, engine_seconds=None)).engine_seconds is None
    assert both.num_cached_tokens == 19
    assert both.environment_stats == {"kills": 37.0, "hits": 6.0}
    assert (both.iteration, both.engine_failure) == (3, "it died")
