"""Credit, worked by hand. Groups stand mixed up and out of order on purpose."""

from __future__ import annotations

import random

import pytest
import torch

from lit_stepwise import algo
from lit_stepwise.algo import GiGPO, GroupRelative, LeaveOneOut, MaxRL, StateValueGAE, TurnReturn
from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import Advantage
from lit_stepwise.types import Feedback, StopReason, Trajectory, Turn, VersionSpan


def trajectory(group: int, *rewards: float, keys: str = "") -> Trajectory:
    """``keys``: what each turn leaves behind, a letter each."""
    feedbacks = [Feedback("", {"r": r}, state_key=keys[i : i + 1] or None) for i, r in enumerate(rewards)]
    turns = [Turn([1], [2], [-0.5], [VersionSpan(0, 1)], "", feedback) for feedback in feedbacks]
    return Trajectory(f"task-{group}", group, 0, turns, StopReason.DONE)


# group 7: returns 3, 0, 1.5 (mean 1.5, unbiased std 1.5);  group 2: a single trajectory
MIXED = [trajectory(7, 1.0, 2.0), trajectory(2, 0.25, 0.5), trajectory(7, 0.0), trajectory(7, 0.5, 0.0, 1.0)]
EVERY_ESTIMATOR = [
    GroupRelative(),
    GroupRelative(norm_by_std=False),
    LeaveOneOut(),
    MaxRL(),
    TurnReturn(discount=0.9),
    TurnReturn(norm_by_std=False),
    GiGPO(),
    GiGPO(discount=0.8, weight=0.7, norm_by_std=True),
    StateValueGAE(discount=0.9, trace=0.6),
]


def flat(values: list[list[float]]) -> list[float]:
    return [x for row in values for x in row]


# ---- one number for the whole trajectory


def test_group_relative_subtracts_the_mean_and_divides_by_the_unbiased_std_for_every_turn() -> None:
    values = GroupRelative()(MIXED)
    assert [len(row) for row in values] == [2, 2, 1, 3]
    assert flat(values) == pytest.approx([1, 1, 0.75, 0.75, -1, 0, 0, 0], abs=1e-5)


def test_group_relative_without_std_keeps_the_scale_of_the_reward() -> None:
    assert flat(GroupRelative(norm_by_std=False)(MIXED)) == pytest.approx([1.5, 1.5, 0.75, 0.75, -1.5, 0, 0, 0])


def test_group_relative_gives_the_numbers_of_torch_with_an_epsilon_of_one_millionth() -> None:
    rewards = torch.tensor([0.3, -1.0, 0.7, 0.05, 1.0], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    values = GroupRelative()([trajectory(4, reward) for reward in rewards.tolist()])
    assert flat(values) == pytest.approx(expected.tolist(), abs=1e-12)


def test_a_group_whose_rewards_are_equal_learns_nothing() -> None:
    assert flat(GroupRelative()([trajectory(0, 1.0), trajectory(0, 0.5, 0.5)])) == [0, 0, 0]


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    # 3 - (0 + 1.5) / 2,  alone,  0 - (3 + 1.5) / 2,  1.5 - (3 + 0) / 2
    assert LeaveOneOut()(MIXED) == [[2.25, 2.25], [0.75, 0.75], [-2.25], [0, 0, 0]]
    assert LeaveOneOut()([trajectory(4, 0.5), trajectory(4, 2.0)]) == [[-1.5], [1.5]]


def test_max_rl_divides_by_the_mean_so_that_a_rare_success_counts_for_more() -> None:
    one_of_four = [trajectory(0, 0.0, 1.0), trajectory(0, 0.0), trajectory(0, 0.0), trajectory(0, 0.0, 0.0)]
    assert MaxRL()(one_of_four) == [[3, 3], [-1], [-1], [-1, -1]]
    three_of_four = [trajectory(1, 1.0), trajectory(1, 0.0), trajectory(1, 1.0), trajectory(1, 1.0)]
    assert flat(MaxRL()(three_of_four)) == pytest.approx([1 / 3, -1, 1 / 3, 1 / 3])
    assert flat(MaxRL()([*one_of_four, *three_of_four]))[6:] == pytest.approx([1 / 3, -1, 1 / 3, 1 / 3])


def test_max_rl_gives_nothing_to_a_group_that_solved_nothing_and_its_reward_to_a_lone_trajectory() -> None:
    assert MaxRL()([trajectory(3, 0.0), trajectory(3, 0.0, 0.0), trajectory(8, 1.0)]) == [[0], [0, 0], [1]]


def test_max_rl_refuses_rewards_that_could_turn_its_sign() -> None:
    with pytest.raises(
        ConfigError, match=r"MaxRL .* attempt at task-5 earned -0\.25; use rewards of 0 and 1, or Leave"
    ):
        MaxRL()([trajectory(5, 1.0), trajectory(5, 0.5, -0.75)])


def test_max_rl_takes_zeros_that_are_only_nearly_so() -> None:
    assert MaxRL()([trajectory(0, 0.1, 0.2, -0.3), trajectory(0, 0.3, -0.1, -0.2)]) == [[0] * 3, [0] * 3]


# ---- a number for each turn


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


def test_turn_return_scales_all_turns_of_a_group_alike_by_the_largest_std_of_a_turn() -> None:
    # std of the turns: 1.5 of (3, 0, 1.5), 1 of (2, 0, 1), 1 / sqrt 3 of (0, 0, 1)
    assert TurnReturn()(MIXED)[3] == pytest.approx([0.0, 0.0, (2 / 3) / 1.5], abs=1e-5)
    # std of the turns: 0.5 sqrt 2 of (0, 1), 2 sqrt 2 of (0, 4)
    values = TurnReturn()([trajectory(0, 0.0), trajectory(0, -3.0, 4.0)])
    assert flat(values) == pytest.approx([-0.5 / 8**0.5, 0.5 / 8**0.5, 2 / 8**0.5], abs=1e-5)


def test_equal_outcomes_after_a_different_number_of_turns_do_not_blow_up() -> None:
    # turn 0: 1 and 1, std 0;  turn 1: 0 and 1, std 1 / sqrt 2
    assert flat(TurnReturn()([trajectory(0, 1.0), trajectory(0, 0.0, 1.0)])) == pytest.approx(
        [0, 0, 0.5**0.5], abs=1e-5
    )


def test_a_lone_survivor_still_learns() -> None:
    last = TurnReturn(norm_by_std=False)([trajectory(0, 0.0), trajectory(0, 0.0, 0.0, 1.0)])[1][2]
    assert last == 0.5


# ---- all of them


@pytest.mark.parametrize("estimator", EVERY_ESTIMATOR, ids=repr)
def test_shuffling_the_trajectories_permutes_the_advantages_and_changes_nothing_else(estimator: Advantage) -> None:
    draw = random.Random(5)
    trajectories = [
        trajectory(
            draw.randrange(4), *(draw.random() for _ in range(length)), keys="".join(draw.choices("abc", k=length))
        )
        for length in draw.choices([1, 2, 3, 4], k=25)
    ]
    before = estimator(trajectories)
    order = draw.sample(range(25), 25)
    after = estimator([trajectories[i] for i in order])
    assert [len(row) for row in before] == [len(each.turns) for each in trajectories]
    for position, i in enumerate(order):
        assert after[position] == pytest.approx(before[i], abs=1e-12)


@pytest.mark.parametrize("estimator", EVERY_ESTIMATOR, ids=repr)
def test_groups_do_not_touch_each_other_and_the_trajectories_stay_as_they_are(estimator: Advantage) -> None:
    one = [trajectory(1, 0.5, 1.5, keys="a"), trajectory(1, 0.25, 3.0, keys="a"), trajectory(1, 1.0)]
    other = [trajectory(2, 7.0, 8.0, keys="a"), trajectory(2, 9.0)]
    together = estimator([one[0], other[0], one[1], other[1], one[2]])
    assert [together[i] for i in (0, 2, 4)] == estimator(one)
    assert [together[i] for i in (1, 3)] == estimator(other)


@pytest.mark.parametrize("estimator", EVERY_ESTIMATOR, ids=repr)
def test_no_trajectories_and_one_without_turns_are_no_trouble(estimator: Advantage) -> None:
    assert estimator([]) == []
    assert estimator([trajectory(0), trajectory(0)]) == [[], []]
    assert estimator([trajectory(0), trajectory(0, 1.0)])[0] == []


@pytest.mark.parametrize("estimator", EVERY_ESTIMATOR, ids=repr)
def test_a_group_of_one_keeps_what_it_earned(estimator: Advantage) -> None:
    assert estimator([trajectory(0, 0.75)]) == [[0.75]]


def test_every_public_estimator_is_tested_here_and_says_what_becomes_of_token_rewards() -> None:
    public = {value for name in algo.__all__ if issubclass(value := getattr(algo, name), Advantage)}
    assert public == {type(estimator) for estimator in EVERY_ESTIMATOR}
    for estimator in public:
        text = " ".join((estimator.__doc__ or "").split())
        assert "Rewards of single tokens are no part of" in text
        assert "they are added to the advantages of their tokens." in text
        assert estimator.needs_state_keys == (estimator in (GiGPO, StateValueGAE))


@pytest.mark.parametrize(
    ("estimator", "fields", "message"),
    [
        (TurnReturn, {"discount": 1.5}, r"advantage\.discount=1\.5 is outside \[0, 1\]; use 1 for the plain sum"),
        (TurnReturn, {"discount": -0.1}, r"advantage\.discount=-0\.1"),
        (GiGPO, {"discount": -0.5}, r"advantage\.discount=-0\.5"),
        (GiGPO, {"weight": -1.0}, r"advantage\.weight=-1\.0 is not 0 or more; use e\.g\. 1"),
        (GiGPO, {"weight": float("nan")}, r"advantage\.weight=nan"),
        (StateValueGAE, {"discount": 2.0}, r"advantage\.discount=2\.0"),
        (StateValueGAE, {"trace": 1.01}, r"advantage\.trace=1\.01 is outside \[0, 1\]; use e\.g\. 0\.95"),
        (StateValueGAE, {"trace": float("nan")}, r"advantage\.trace=nan"),
    ],
)
def test_settings_outside_their_range_are_refused(
    estimator: type[Advantage], fields: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        estimator(**fields)
