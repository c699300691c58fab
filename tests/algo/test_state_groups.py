"""Credit by state, worked by hand."""

from __future__ import annotations

import pytest

from lit_stepwise.algo import GiGPO, GroupRelative, StateValueGAE
from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import Advantage
from lit_stepwise.types import Feedback, StopReason, Trajectory, Turn, VersionSpan


def attempt(*turns: tuple[float, str | None]) -> Trajectory:
    """The reward of each turn and the state that it leaves behind."""
    feedbacks = [Feedback("", {"r": reward}, state_key=key) for reward, key in turns]
    played = [Turn([1], [2], [-0.5], [VersionSpan(0, 1)], "", feedback) for feedback in feedbacks]
    return Trajectory("task-3", 0, 0, played, StopReason.DONE)


# s is shared by the first two, t and u are of one trajectory alone
GROUP = [
    attempt((1.0, "s"), (0.0, "t"), (4.0, None)),
    attempt((2.0, "s"), (3.0, None)),
    attempt((0.25, "u"), (1.0, None)),
]
# with a discount of 0.5 the returns are (2, 2, 4), (3.5, 3), (0.75, 1)


def flat(values: list[list[float]]) -> list[float]:
    return [x for row in values for x in row]


def test_gigpo_adds_the_comparison_within_the_state_to_that_of_the_outcomes() -> None:
    # outcomes 5, 5, 1.25: 1.25, 1.25, -2.5.  From the task 2, 3.5, 0.75: -1/12, 17/12, -16/12.  From s 2, 3: -0.5, 0.5
    values = GiGPO(discount=0.5, weight=2.0)(GROUP)
    assert values[0] == pytest.approx([1.25 - 2 / 12, 1.25 - 1, 1.25])
    assert values[1] == pytest.approx([1.25 + 34 / 12, 1.25 + 1])
    assert values[2] == pytest.approx([-2.5 - 32 / 12, -2.5])


def test_gigpo_divides_either_comparison_by_its_own_std() -> None:
    outcome = (1.25**2 + 1.25**2 + 2.5**2) ** 0.5 / 2**0.5
    task = (1 + 17**2 + 16**2) ** 0.5 / 12 / 2**0.5
    values = GiGPO(discount=0.5, weight=2.0, norm_by_std=True)(GROUP)
    assert values[0] == pytest.approx(
        [1.25 / outcome - 2 / 12 / task, 1.25 / outcome - 2**0.5, 1.25 / outcome], abs=1e-5
    )
    assert values[2] == pytest.approx([-2.5 / outcome - 32 / 12 / task, -2.5 / outcome], abs=1e-5)


def test_gigpo_is_by_default_what_was_published_for_agents() -> None:
    assert GiGPO() == GiGPO(discount=0.95, weight=1.0, norm_by_std=False)


def test_gigpo_with_no_weight_on_states_is_group_relative() -> None:
    for norm_by_std in (True, False):
        assert GiGPO(weight=0.0, norm_by_std=norm_by_std)(GROUP) == GroupRelative(norm_by_std)(GROUP)


def test_gigpo_compares_a_trajectory_that_comes_back_to_a_state_with_itself_too() -> None:
    # from s: 0.5 ^ 1 * 6, then 6;  the outcomes are equal
    group = [attempt((0.0, "s"), (0.0, "s"), (6.0, None)), attempt((6.0, None))]
    values = GiGPO(discount=0.5)(group)
    # from the task: 1.5 and 6
    assert flat(values) == pytest.approx([-2.25, -1.5, 1.5, 2.25])


def test_state_value_gae_trusts_the_others_where_they_have_been_and_itself_where_they_have_not() -> None:
    values = StateValueGAE(discount=0.5, trace=0.25)(GROUP)
    # first: the others earned (3.5 + 0.75) / 2 = 2.125 from the task and 3 from s; nobody else was in t
    #   turn 2: 4 - 2.125;  turn 1: 0 + 0.5 * 4 - (3 + 2.125) / 2;  turn 0: 1 + 0.5 * (0.75 * 3 + 0.25 * 2) - 2.125
    assert values[0] == pytest.approx([0.25, -0.5625, 1.875])
    # second: (2 + 0.75) / 2 = 1.375 from the task, 2 from s
    #   turn 1: 3 - (2 + 1.375) / 2;  turn 0: 2 + 0.5 * (0.75 * 2 + 0.25 * 3) - 1.375
    assert values[1] == pytest.approx([1.75, 1.3125])
    # third: (2 + 3.5) / 2 = 2.75 from the task; nobody else was in u
    #   turn 1: 1 - 2.75;  turn 0: 0.25 + 0.5 * 1 - 2.75
    assert values[2] == pytest.approx([-2.0, -1.75])


def test_state_value_gae_is_the_sum_of_residuals_but_for_its_steadier_baseline() -> None:
    rewards = [[1.0, 0.5, 2.0], [0.25, 3.0, 0.75], [4.0, 0.1, 0.2]]
    group = [attempt((a, "s"), (b, "t"), (c, None)) for a, b, c in rewards]
    discount, trace = 0.9, 0.6
    returns = [[a + 0.9 * b + 0.81 * c, b + 0.9 * c, c] for a, b, c in rewards]
    for i, row in enumerate(StateValueGAE(discount, trace)(group)):
        values = [sum(returns[j][t] for j in range(3) if j != i) / 2 for t in range(3)] + [0.0]
        deltas = [rewards[i][t] + discount * values[t + 1] - values[t] for t in range(3)]
        sums = [sum((discount * trace) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(3)]
        steadied = [(2 * values[t] + values[0]) / 3 for t in range(3)]
        expected = [sums[t] + values[t] - steadied[t] for t in range(3)]
        assert row == pytest.approx(expected, abs=1e-12)


def test_state_value_gae_takes_the_mean_of_all_visits_of_the_others() -> None:
    # from the task the first earned 5.5, from s 5 and then 4; the second, which is compared with all of it, 1
    group = [attempt((0.5, "s"), (1.0, "s"), (4.0, None)), attempt((2.0, "s"), (1.0, None))]
    assert StateValueGAE(trace=1.0)(group)[1] == pytest.approx([3 - 5.5, 1 - (5 + 4 + 5.5) / 3])


def test_with_a_full_trace_state_value_gae_is_the_return_less_what_the_others_earned_from_there() -> None:
    values = StateValueGAE(discount=0.5, trace=1.0)(GROUP)
    first, second = 2.125, 1.375  # what the others earned from the task
    assert values[0] == pytest.approx([2 - first, 2 - (3 + first) / 2, 4 - first])
    assert values[1] == pytest.approx([3.5 - second, 3 - (2 + second) / 2])
    assert values[2] == pytest.approx([0.75 - 2.75, 1 - 2.75])


@pytest.mark.parametrize("estimator", [GiGPO(), StateValueGAE()], ids=["GiGPO", "StateValueGAE"])
def test_a_turn_without_a_state_is_refused_with_the_way_out(estimator: Advantage) -> None:
    name = type(estimator).__name__
    message = (
        rf"rollout\.advantage={name} .* turn 1 of an attempt at task-3 brought back no state_key; use an .* TurnReturn"
    )
    with pytest.raises(ConfigError, match=message):
        estimator([attempt((1.0, "s"), (2.0, None), (3.0, None))])


@pytest.mark.parametrize("estimator", [GiGPO(), StateValueGAE()], ids=["GiGPO", "StateValueGAE"])
def test_the_last_turn_needs_no_state_and_what_it_leaves_behind_is_never_visited(estimator: Advantage) -> None:
    without = [attempt((1.0, "s"), (2.0, None)), attempt((4.0, "s"), (8.0, None)), attempt((16.0, None))]
    with_last = [attempt((1.0, "s"), (2.0, "s")), attempt((4.0, "s"), (8.0, "s")), attempt((16.0, "s"))]
    assert estimator(with_last) == estimator(without)
