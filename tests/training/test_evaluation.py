"""Greedy accuracy beside pass@k, worked by hand."""

from __future__ import annotations

import pytest

from lit_stepwise.training.evaluation import EvaluationMetrics, pass_at
from lit_stepwise.types import Feedback, Rollout, StopReason, Trajectory, Turn, VersionSpan


def attempt(group: int, outcome: str, temperature: float, reward: float = 0.0) -> Trajectory:
    """``+`` solved the task, ``-`` did not, ``!`` failed."""
    feedback = Feedback("", {"goal": reward}, done=True, success=outcome == "+")
    turns = [Turn([1], [2, 3], [-0.5, -0.25], [VersionSpan(0, 2)], "", feedback)]
    failed = outcome == "!"
    reason = StopReason.FAILED if failed else StopReason.DONE
    return Trajectory(f"t{group}", group, 0, turns, reason, temperature, failure="disk full" if failed else "")


def attempts(group: int, outcomes: str, temperature: float = 0.5, reward: float = 0.0) -> list[Trajectory]:
    return [attempt(group, outcome, temperature, reward) for outcome in outcomes]


def evaluated(*trajectories: Trajectory) -> dict[str, float]:
    metrics = EvaluationMetrics()
    metrics.update(Rollout("evaluate", -1, 0, trajectories, wait_seconds=1.5))
    return metrics.result("val")


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        # of 6 attempts 2 succeed; C(4, k) / C(6, k) is 4/6, 6/15, 1/15 and 0
        ("+--+--", {1: 2 / 6, 2: 9 / 15, 4: 14 / 15, 6: 1.0}),
        ("---", {1: 0.0, 2: 0.0, 3: 0.0}),
        ("+", {1: 1.0}),
        ("+++-", {1: 3 / 4, 2: 1.0, 4: 1.0}),
        # 3 of 4 count, of which 1 succeeds, and nobody knows of 4
        ("-!+-", {1: 1 / 3, 2: 2 / 3}),
        ("!!", {}),
    ],
)
def test_pass_at_k_is_the_unbiased_estimate(outcomes: str, expected: dict[int, float]) -> None:
    assert pass_at(attempts(0, outcomes)) == pytest.approx(expected)


def test_means_are_of_the_greedy_attempts_and_pass_at_k_of_the_drawn_ones() -> None:
    greedy = [attempt(0, "+", 0.0, 0.75), attempt(1, "-", 0.0, 0.25), attempt(2, "!", 0.0, 9.0)]
    drawn = [*attempts(0, "+--+", reward=5.0), *attempts(1, "---+"), *attempts(2, "!-!-")]
    values = evaluated(*greedy, *drawn)
    assert values["val/accuracy"] == 0.5
    assert values["val/reward"] == values["val/reward_goal"] == 0.5
    assert values["val/failed"] == pytest.approx(1 / 3)
    assert values["seconds/evaluate"] == 1.5
    found = {name: value for name, value in values.items() if "pass_at" in name}
    assert found == pytest.approx(
        {
            "val/pass_at_1": (2 / 4 + 1 / 4 + 0) / 3,
            "val/pass_at_2": (5 / 6 + 3 / 6 + 0) / 3,
            "val/pass_at_4": 1.0,  # the last task knows of no 4 attempts
        }
    )


def test_where_nothing_is_greedy_the_means_are_of_the_drawn_attempts() -> None:
    values = evaluated(*attempts(0, "+-+", reward=3.0), *attempts(1, "-!-"))
    assert values["val/accuracy"] == pytest.approx(2 / 5)
    assert values["val/reward"] == pytest.approx(9 / 5)
    assert values["val/pass_at_1"] == pytest.approx((2 / 3 + 0) / 2)
    assert values["val/pass_at_3"] == 1.0


def test_greedy_play_alone_has_no_pass_at_k() -> None:
    assert not [name for name in evaluated(attempt(0, "+", 0.0)) if "pass_at" in name]
