"""Credit, worked by hand. Groups stand mixed up and out of order on purpose."""

from __future__ import annotations

import pytest

from lit_stepwise.algo import GroupRelative, TurnReturn
from lit_stepwise.errors import ConfigError
from lit_stepwise.types import Feedback, StopReason, Trajectory, Turn


def trajectory(group: int, *rewards: float) -> Trajectory:
    turns = [Turn([1], [2], [-0.5], 0, "", Feedback("", {"r": reward})) for reward in rewards]
    return Trajectory(f"task-{group}", group, 0, turns, StopReason.DONE)


# group 7: returns 3, 0, 1.5 (mean 1.5, unbiased std 1.5);  group 2: a single trajectory
MIXED = [trajectory(7, 1.0, 2.0), trajectory(2, 0.25, 0.5), trajectory(7, 0.0), trajectory(7, 0.5, 0.0, 1.0)]


def flat(values: list[list[float]]) -> list[float]:
    return [x for row in values for x in row]


def test_group_relative_subtracts_the_mean_and_divides_by_the_unbiased_std_for_every_turn() -> None:
    values = GroupRelative()(MIXED)
    assert [len(row) for row in values] == [2, 2, 1, 3]
    assert flat(values) == pytest.approx([1, 1, 0.75, 0.75, -1, 0, 0, 0], abs=1e-5)


def test_group_relative_without_std_keeps_the_scale_of_the_reward() -> None:
    assert flat(GroupRelative(norm_by_std=False)(MIXED)) == pytest.approx([1.5, 1.5, 0.75, 0.75, -1.5, 0, 0, 0])


def test_a_group_whose_rewards_are_equal_learns_nothing() -> None:
    assert flat(GroupRelative()([trajectory(0, 1.0), trajectory(0, 0.5, 0.5)])) == [0, 0, 0]


def test_turn_return_compares_each_turn_with_the_whole_group_at_that_turn() -> None:
    # returns to go: (3, 2), (0), (1.5, 1, 1); a trajectory that has ended counts as 0
    # turn 0 mean 1.5;  turn 1 mean (2 + 0 + 1) / 3 = 1;  turn 2 mean (0 + 0 + 1) / 3
    values = TurnReturn(norm_by_std=False)(MIXED)
    assert flat(values) == pytest.approx([1.5, 1.0, 0.75, 0.5, -1.5, 0.0, 0.0, 2 / 3])


def test_turn_return_discounts_what_comes_later() -> None:
    # discount 0.5: (1 + 1, 2), (0.5 + 0.25, 0 + 0.5, 1), and 0;  turn 0 mean 2.75 / 3
    values = TurnReturn(discount=0.5, norm_by_std=False)(MIXED)
    assert values[0] == pytest.approx([2 - 2.75 / 3, 2 - 2.5 / 3])
    assert values[3] == pytest.approx([0.75 - 2.75 / 3, 0.5 - 2.5 / 3, 1 - 1 / 3])


def test_turn_return_scales_all_turns_of_a_group_by_the_std_of_the_first() -> None:
    assert TurnReturn()(MIXED)[3] == pytest.approx([0.0, 0.0, (2 / 3) / 1.5], abs=1e-5)


def test_a_lone_survivor_still_learns() -> None:
    last = TurnReturn(norm_by_std=False)([trajectory(0, 0.0), trajectory(0, 0.0, 0.0, 1.0)])[1][2]
    assert last == 0.5


def test_a_discount_outside_its_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"discount=1\.5"):
        TurnReturn(discount=1.5)
