"""What is measured of play, worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from lit_stepwise.training.play_metrics import RolloutMetrics, Staleness, TrajectoryMetrics
from lit_stepwise.types import Feedback, Rollout, StopReason, Trajectory, Turn, VersionSpan


def turn(reward: float, tokens: int, **feedback: Any) -> Turn:
    rewards = {"outcome": reward - 0.125, "format": 0.125}
    return Turn([1], [2] * tokens, [-0.5] * tokens, [VersionSpan(7, tokens)], "", Feedback("", rewards, **feedback))


def reading(prompt_ids: list[int], response_ids: list[int]) -> Turn:
    size = len(response_ids)
    return Turn(prompt_ids, response_ids, [-0.5] * size, [VersionSpan(7, size)], "", Feedback(""))


def sampled_by(*versions: tuple[int, int], failed: bool = False) -> Trajectory:
    """One turn whose tokens are of these weights: (``global_step``, number of tokens)."""
    spans = [VersionSpan(*each) for each in versions]
    size = sum(each.num_tokens for each in spans)
    made = Turn([1], [2] * size, [-0.5] * size, spans, "", Feedback(""))
    reason = StopReason.FAILED if failed else StopReason.DONE
    return Trajectory("a", 0, 0, [made], reason, failure="disk full" if failed else "")


def test_everything_of_an_iterations_play() -> None:
    done = {"done": True, "success": True}
    trajectories = [
        Trajectory("a", 0, 0, [turn(0.25, 3), turn(1.0, 5, **done)], StopReason.DONE),
        Trajectory("a", 0, 1, [turn(-0.5, 4, format_error=True)], StopReason.MAX_TURNS),
        Trajectory("b", 1, 0, [turn(50.0, 11)], StopReason.FAILED, failure="disk full"),
        Trajectory("b", 1, 1, [turn(0.75, 6)], StopReason.CONTEXT),
        Trajectory("b", 1, 2, [], StopReason.MAX_TURNS),
    ]
    rollout = Rollout(
        "train", 3, 7, trajectories, engine_seconds=1.5, environment_seconds=2.5, sync_seconds=0.25, play_seconds=3.5,
        wait_seconds=0.5, cycle_seconds=8.0, busy_seconds=3.0, num_cached_tokens=6,
        environment_stats={"kills": 2.0, "queue_seconds": 0.75},
    )  # fmt: skip
    metrics = RolloutMetrics()
    metrics.update(rollout, began=10, num_steps=2, max_age=2)
    values = metrics.result()
    assert values == pytest.approx(
        {
            "rollout/reward": (1.25 - 0.5 + 0.75) / 4,
            "rollout/reward_outcome": (1.25 - 0.5 + 0.75 - 4 * 0.125) / 3,
            "rollout/reward_format": 4 * 0.125 / 3,
            "rollout/accuracy": 1 / 4,
            "rollout/turns": (2 + 1 + 1) / 4,
            "rollout/format_errors": 1 / 4,
            "rollout/response_tokens": (3 + 5 + 4 + 6) / 4,
            "rollout/prefix_continuity": 0.0,
            "rollout/failed": 1 / 5,
            "rollout/stopped_done": 1 / 5,
            "rollout/stopped_max_turns": 2 / 5,
            "rollout/stopped_context": 1 / 5,
            "rollout/staleness": 3.0,
            "rollout/staleness_max": 3.0,
            "rollout/stale_0": 0.0,
            "rollout/stale_1": 0.0,
            "rollout/stale_2": 1.0,
            "seconds/engine": 1.5,
            "seconds/environment": 2.5,
            "seconds/sync": 0.25,
            "seconds/play": 3.5,
            "seconds/wait": 0.5,
            "idle/trainer": 0.5 / 8,
            "idle/engine": 5 / 8,
            "tokens/generated": 29.0,
            "tokens/cached": 6.0,
            "environment/kills": 2.0,
            "environment/queue_seconds": 0.75,
        }
    )


def test_the_next_iteration_starts_afresh_and_the_first_has_no_cycle_to_be_idle_in() -> None:
    metrics = RolloutMetrics()
    for reward in (0.5, 2.0):
        played = Trajectory("a", 0, 0, [turn(reward, 3)], StopReason.DONE)
        stats = {"kills": 4 * reward}
        metrics.update(Rollout("train", 0, 0, [played], 1.0, environment_stats=stats), began=7, num_steps=1, max_age=1)
        values = metrics.result()
        assert values["rollout/reward_outcome"] == reward - 0.125
        assert values["environment/kills"] == 4 * reward
        assert not any(name.startswith("idle/") for name in values)
    metrics.update(Rollout("train", 2, 0, []), began=7, num_steps=1, max_age=1)
    values = metrics.result()
    assert "rollout/reward_outcome" not in values
    assert values["environment/kills"] == values["tokens/generated"] == 0.0


def test_prefix_continuity_is_the_share_of_later_turns_that_read_on_where_the_one_before_ended() -> None:
    trajectories = [
        Trajectory(
            "a", 0, 0,
            [
                reading([1, 2], [3]),
                reading([1, 2, 3, 9], [4, 5]),  # reads on
                reading([1, 2, 9, 4, 5], [6]),  # a thought was taken out
                reading([1, 2, 9, 4, 5, 6], [7]),  # reads on, and nothing was said in between
            ],
            StopReason.DONE,
        ),
        Trajectory("b", 1, 0, [reading([1], [2]), reading([1], [2])], StopReason.MAX_TURNS),  # shorter than what it was
        Trajectory("c", 2, 0, [reading([8], [8])], StopReason.DONE),
    ]  # fmt: skip
    metrics = TrajectoryMetrics()
    metrics.update(trajectories)
    assert metrics.result("rollout")["rollout/prefix_continuity"] == pytest.approx(2 / 4)
    metrics.update(trajectories[2:])
    assert "rollout/prefix_continuity" not in metrics.result("rollout")


def test_staleness_is_counted_from_the_step_at_which_training_of_the_iteration_began() -> None:
    staleness = Staleness()
    trajectories = [
        sampled_by((12, 3), (11, 5)),  # of now; of one optimizer step before
        sampled_by((9, 7)),  # of a whole iteration before
        sampled_by((8, 2), (1, 1)),  # into the second iteration before; older than the histogram goes
        sampled_by((4, 100), failed=True),
        sampled_by((0, 0)),  # nothing was sampled
    ]
    staleness.update(trajectories, began=12, num_steps=3, max_age=2)
    assert staleness.result("rollout") == pytest.approx(
        {
            "rollout/staleness": (3 * 0 + 5 * 1 + 7 * 3 + 2 * 4 + 1 * 11) / 18,
            "rollout/staleness_max": 11.0,
            "rollout/stale_0": 3 / 18,
            "rollout/stale_1": (5 + 7) / 18,
            "rollout/stale_2": (2 + 1) / 18,
        }
    )
    staleness.update([], began=15, num_steps=3, max_age=2)
    assert staleness.result("rollout") == {}


def test_a_component_may_have_any_name() -> None:
    metrics = TrajectoryMetrics()
    feedback = Feedback("", {"type": 0.25, "a.b": 0.5, "values": 1.0})
    played = Trajectory("a", 0, 0, [Turn([1], [2], [-0.5], [VersionSpan(0, 1)], "", feedback)], StopReason.DONE)
    metrics.update([played])
    values = metrics.result("val")
    assert [values[f"val/reward_{name}"] for name in ("type", "a.b", "values")] == [0.25, 0.5, 1.0]
