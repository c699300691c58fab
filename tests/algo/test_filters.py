"""What is trained, worked by hand. Groups stand mixed up and out of order on purpose."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from lit_stepwise.algo import CISPO, GSPO, SAPO, Clip, DualClip, GroupRelative
from lit_stepwise.algo.filters import Filters, Selection
from lit_stepwise.algo.reductions import Reduction, token_weights
from lit_stepwise.errors import ConfigError, StepwiseError
from lit_stepwise.interfaces import PolicyLoss
from lit_stepwise.types import Feedback, StepSample, StopReason, Trajectory, Turn, VersionSpan

DONE, MAX_TURNS, CONTEXT, FAILED = StopReason.DONE, StopReason.MAX_TURNS, StopReason.CONTEXT, StopReason.FAILED
CREDIT = (Path(__file__).parents[2] / "docs" / "credit.md").read_text()


def turn(num_tokens: int = 1, reward: float = 0.0, success: bool = False, cut: bool = False, **others: Any) -> Turn:
    feedback = Feedback("", {"r": reward}, done=success, success=success)
    finish: Any = "length" if cut else "stop"
    return Turn(
        [1],
        [2] * num_tokens,
        [-0.5] * num_tokens,
        [VersionSpan(0, num_tokens)],
        "",
        feedback,
        finish_reason=finish,
        **others,
    )


def attempt(group: int, *turns: Turn, stop: StopReason = DONE) -> Trajectory:
    return Trajectory(f"task-{group}", group, 0, turns, stop, failure="disk full" if stop is FAILED else "")


SOLVED, WRONG = turn(success=True, reward=1.0), turn(reward=-1.0)


def zeros(trajectories: list[Trajectory]) -> list[list[float]]:
    return [[0.0] * len(each.turns) for each in trajectories]


# ---- dynamic sampling: group

OUTCOMES = [
    attempt(7, SOLVED),  # 7: one of two
    attempt(4, WRONG, SOLVED),  # 4: both, in different numbers of turns, so their turns differ and they do not
    attempt(9, WRONG),  # 9: neither, with different rewards
    attempt(7, WRONG, WRONG),
    attempt(3, SOLVED),  # 3: alone
    attempt(5, SOLVED),  # 5: the other one failed
    attempt(4, turn(), SOLVED),
    attempt(5, WRONG, stop=FAILED),
    attempt(9, turn(reward=0.25)),
    attempt(2, WRONG, stop=FAILED),  # 2: all failed
]


def test_a_group_is_kept_whose_attempts_differ_in_success() -> None:
    assert Filters(dynamic_sampling="success").kept_groups(OUTCOMES) == {7}


def test_a_group_is_kept_whose_attempts_differ_in_the_reward_of_all_their_turns() -> None:
    assert Filters(dynamic_sampling="reward").kept_groups(OUTCOMES) == {7, 4, 9}
    two_ways_to_a_half = [attempt(1, turn(reward=0.75), turn(reward=-0.25)), attempt(1, turn(reward=0.5))]
    assert Filters(dynamic_sampling="reward").kept_groups(two_ways_to_a_half) == set()


def test_sums_that_differ_by_rounding_alone_are_equal() -> None:
    rounded = [attempt(1, turn(reward=0.1), turn(reward=0.2)), attempt(1, turn(reward=0.3))]
    assert rounded[0].reward != rounded[1].reward
    assert Filters(dynamic_sampling="reward").kept_groups(rounded) == set()
    near = [attempt(1, turn(reward=0.3)), attempt(1, turn(reward=0.30001))]
    assert Filters(dynamic_sampling="reward").kept_groups(near) == {1}


def test_without_dynamic_sampling_every_group_is_kept() -> None:
    assert Filters().kept_groups(OUTCOMES) == {7, 4, 9, 3, 5, 2}


@pytest.mark.parametrize(
    ("num_kept", "num_rounds", "expected"), [(3, 1, 5), (7, 2, 1), (8, 1, 0), (9, 2, 0), (3, 3, 0)]
)
def test_as_many_tasks_are_played_as_groups_are_missing_until_the_bound(
    num_kept: int, num_rounds: int, expected: int
) -> None:
    filters = Filters(dynamic_sampling="success", max_rounds=3)
    assert filters.missing_groups(8, num_kept, num_rounds) == expected


def test_at_the_bound_the_run_ends_if_that_is_wanted_and_groups_are_missing() -> None:
    filters = Filters(dynamic_sampling="reward", max_rounds=3, at_bound="error")
    assert filters.missing_groups(8, 5, 2) == 3
    assert filters.missing_groups(8, 8, 3) == 0
    with pytest.raises(
        StepwiseError, match=r"max_rounds=3\) gave 5 of 8 groups whose attempts differ in reward; raise"
    ):
        filters.missing_groups(8, 5, 3)


def test_one_round_is_never_followed_by_another() -> None:
    assert Filters(dynamic_sampling="success", max_rounds=1).missing_groups(8, 5, 1) == 0


def test_ten_rounds_are_played_at_most_unless_told_otherwise() -> None:
    filters = Filters(dynamic_sampling="success")
    assert [filters.missing_groups(8, 5, num_rounds) for num_rounds in (9, 10)] == [3, 0]


def test_without_dynamic_sampling_no_group_is_missing() -> None:
    assert Filters(at_bound="error").missing_groups(8, 5, 99) == 0


# ---- the price of length: turn

PRICED = Filters(overlong_margin_tokens=40, overlong_penalty=0.5)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0.0), (60, 0.0), (61, -0.0125), (70, -0.125), (90, -0.375), (100, -0.5), (130, -0.5)],
)
def test_the_price_falls_linearly_within_the_margin(num_tokens: int, expected: float) -> None:
    (priced,) = PRICED.with_penalties([attempt(0, turn(num_tokens, reward=2.0))], max_new_tokens=100)
    assert priced.reward_components == {"r": 2.0, "overlong": pytest.approx(expected, abs=1e-15)}


def test_every_turn_pays_for_itself_and_nothing_else_changes() -> None:
    played = attempt(3, turn(90, reward=0.25), turn(20), turn(70, reward=1.0, success=True, cut=True))
    (priced,) = PRICED.with_penalties([played], max_new_tokens=100)
    costs = [each.feedback.rewards["overlong"] for each in priced.turns]
    assert str(costs) == "[-0.375, 0.0, -0.125]"  # no negative zero
    assert [each.reward for each in priced.turns] == [-0.125, 0.0, 0.875]
    assert played.reward == 1.25
    bare = [replace(each, feedback=replace(each.feedback, rewards={"r": 0})) for each in (*priced.turns, *played.turns)]
    assert bare[:3] == bare[3:]
    assert replace(priced, turns=played.turns) == played


def test_the_whole_budget_costs_one_unless_told_otherwise() -> None:
    (priced,) = Filters(overlong_margin_tokens=40).with_penalties([attempt(3, turn(100), turn(80))], max_new_tokens=100)
    assert [each.reward for each in priced.turns] == [-1.0, -0.5]


def test_a_failed_trajectory_has_no_price() -> None:
    failed = attempt(3, turn(99), stop=FAILED)
    assert PRICED.with_penalties([failed], max_new_tokens=100) == [failed]


def test_without_a_margin_no_component_is_added() -> None:
    assert Filters().with_penalties(OUTCOMES, max_new_tokens=1) == OUTCOMES


def test_a_component_of_that_name_is_not_overwritten() -> None:
    once = PRICED.with_penalties([attempt(3, turn(99))], max_new_tokens=100)
    with pytest.raises(ConfigError, match="overlong_margin_tokens=40 adds the reward component 'overlong', but"):
        PRICED.with_penalties(once, max_new_tokens=100)


# ---- masks: trajectory

ENDS = [
    attempt(0, turn(), turn(cut=True), stop=DONE),
    attempt(0, turn(cut=True), turn(), stop=DONE),  # cut, answered and mended
    attempt(0, turn(), stop=CONTEXT),
    attempt(0, stop=CONTEXT),  # no room for a single turn
    attempt(0, turn(), stop=MAX_TURNS),
    attempt(0, turn(cut=True), stop=MAX_TURNS),
    attempt(0, turn(cut=True), stop=FAILED),
]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(), [0, 0, 0, 0, 0, 0, 0]),
        (Filters(mask_overlong=True), [1, 0, 1, 1, 0, 1, 0]),
        (Filters(mask_max_turns=True), [0, 0, 0, 0, 1, 1, 0]),
        (Filters(mask_overlong=True, mask_max_turns=True), [1, 0, 1, 1, 1, 1, 0]),
    ],
)
def test_trajectories_are_masked_that_were_cut_at_their_end(filters: Filters, expected: list[int]) -> None:
    assert filters.masked(ENDS) == [bool(each) for each in expected]


def test_a_masked_trajectory_stays_in_the_baseline() -> None:
    group = [attempt(1, SOLVED), attempt(1, turn(reward=-2.0, cut=True)), attempt(1, turn(reward=4.0))]
    advantages = GroupRelative(norm_by_std=False)(group)
    assert advantages == [[0], [-3], [3]]  # of a mean of 1; without the masked one it would be 2.5
    assert Filters(mask_overlong=True).selection(group, advantages, {1}).trained == [True, False, True]


# ---- flat groups


def test_a_group_is_flat_if_every_advantage_of_it_is_zero() -> None:
    trajectories = [attempt(6, turn(), turn()), attempt(8, turn()), attempt(6, turn()), attempt(8, turn(), turn())]
    assert Filters().flat_groups(trajectories, [[0.0, 1e-9], [0.0], [-1e-9], [0.0, -0.01]]) == {6}
    assert Filters().flat_groups(trajectories, [[0.0, 0.0], [0.25], [0.0], [0.0, 0.0]]) == {6}


def test_equal_rewards_are_flat_however_their_mean_is_rounded() -> None:
    group = [attempt(1, turn(reward=0.1)) for _ in range(3)]
    advantages = GroupRelative()(group)
    assert advantages[0][0] != 0
    assert Filters().flat_groups(group, advantages) == {1}


def test_a_group_with_token_rewards_has_something_to_learn() -> None:
    nothing, something = turn(2, token_rewards=[0.0, 0.0]), turn(3, token_rewards=[0.0, -0.25, 0.0])
    trajectories = [attempt(1, nothing), attempt(2, turn(), something), attempt(2, turn())]
    assert Filters().flat_groups(trajectories, zeros(trajectories)) == {1}


def test_failed_trajectories_make_no_group_flat_and_keep_none_from_being_so() -> None:
    trajectories = [attempt(1, turn(), stop=FAILED), attempt(2, turn(), stop=FAILED), attempt(2, turn())]
    assert Filters().flat_groups(trajectories, [[0.0], [0.5], [0.0]]) == {2}


@pytest.mark.parametrize("loss", [Clip(), DualClip(), GSPO(), CISPO(), SAPO()], ids=lambda loss: type(loss).__name__)
def test_advantages_of_zero_have_no_gradient_in_any_objective(loss: PolicyLoss) -> None:
    logprobs = torch.tensor([-0.1, -2.0, -0.7, -1.1], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.3, -0.2, -0.9, -1.1], dtype=torch.float64)
    everywhere, turns = torch.ones(4, dtype=torch.bool), torch.tensor([0, 0, 1, 1])
    losses = loss(logprobs, old, torch.zeros(4, dtype=torch.float64), everywhere, turns).losses
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    assert losses.tolist() == gradient.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("reduction", "factor"),
    [("token", 16 / 9), ("step", 5 / 3), ("trajectory", 4 / 2), ("prompt", 3 / 1), ("constant", 4 / 2)],
)
def test_without_flat_groups_the_others_weigh_more_by_the_ratio_of_the_denominators(
    reduction: Reduction, factor: float
) -> None:
    def row(group: int, sample: int, number: int, n: int) -> StepSample:
        return StepSample([1], [2] * n, [True] * n, [-0.5] * n, [0.0] * n, 0.0, group, sample, number, 0)

    learning = [row(5, 0, 0, 2), row(5, 0, 1, 3), row(5, 1, 0, 4)]
    flat = [row(1, 0, 0, 6), row(2, 0, 0, 1)]
    weights = token_weights([*flat, *learning], reduction, max_new_tokens=8)[2:]
    expected = [weight * factor for weight in weights]
    assert token_weights(learning, reduction, max_new_tokens=8) == pytest.approx(expected, rel=1e-14)


# ---- all of them at once

PLAYED = [
    attempt(8, turn(3, reward=1.0), turn(4)),  # 8: trains, but for the one that was cut and the one that failed
    attempt(6, turn(50)),  # 6: not kept
    attempt(8, turn(7, cut=True)),
    attempt(5, turn(200, reward=0.5)),  # 5: flat
    attempt(8, turn(1000), stop=FAILED),
    attempt(2, turn(10_000, cut=True), stop=CONTEXT),  # 2: all cut
    attempt(6, turn(23), turn(37, cut=True)),
    attempt(5, turn(300, reward=0.5, cut=True)),
    attempt(2, turn(20_000, reward=3.0, cut=True)),
]
CREDITED = [[0.5, 0.5], [0.0], [-0.5], [0.0], [0.0], [-1.5], [0.0, 0.0], [0.0], [1.5]]
ALL = Filters(dynamic_sampling="success", drop_flat_groups=True, mask_overlong=True)


def test_everything_that_is_left_out_is_counted_once() -> None:
    assert ALL.selection(PLAYED, CREDITED, groups={8, 5, 2}, num_rounds=3) == Selection(
        left_out=["", "uniform", "masked", "flat", "failed", "masked", "uniform", "flat", "masked"],
        rounds=3,
        groups_in=4,
        groups_uniform=1,
        groups_flat=1,
        groups_kept=1,
        trajectories_masked=3,
        tokens_dropped=30_617,
    )


def test_flat_groups_are_counted_but_trained_unless_they_are_to_be_dropped() -> None:
    filters = replace(ALL, drop_flat_groups=False)
    selection = filters.selection(PLAYED, CREDITED, groups={8, 5, 2}, num_rounds=3)
    assert [i for i, trained in enumerate(selection.trained) if trained] == [0, 3]
    assert (selection.groups_flat, selection.groups_kept) == (1, 2)
    assert (selection.trajectories_masked, selection.tokens_dropped) == (4, 30_417)


def test_the_default_trains_all_that_did_not_fail() -> None:
    filters = Filters()
    selection = filters.selection(PLAYED, CREDITED, filters.kept_groups(PLAYED))
    assert selection == Selection(["failed" if each.failed else "" for each in PLAYED], 1, 4, 0, 2, 4, 0, 0)


def test_the_metrics_have_the_same_names_always() -> None:
    values = ALL.selection(PLAYED, CREDITED, groups={8, 5, 2}, num_rounds=3).metrics
    assert values == {
        "rollout/rounds": 3,
        "rollout/groups_in": 4,
        "rollout/groups_uniform": 1,
        "rollout/groups_flat": 1,
        "rollout/groups_kept": 1,
        "rollout/trajectories_masked": 3,
        "rollout/tokens_dropped": 30_617,
    }
    assert list(Filters().selection([], [], set()).metrics) == list(values)
    assert all(type(value) is float for value in values.values())


def test_the_order_of_the_trajectories_changes_nothing() -> None:
    filters = replace(ALL, overlong_margin_tokens=40, mask_max_turns=True)
    both = [*OUTCOMES, *[replace(each, group=each.group + 10) for each in PLAYED]]
    credit = [*zeros(OUTCOMES), *CREDITED]
    credit[0] = [0.7]
    order = list(range(len(both)))
    random.Random(4).shuffle(order)
    mixed, credit_mixed = [both[i] for i in order], [credit[i] for i in order]
    assert filters.kept_groups(mixed) == filters.kept_groups(both)
    assert filters.masked(mixed) == [filters.masked(both)[i] for i in order]
    assert filters.flat_groups(mixed, credit_mixed) == filters.flat_groups(both, credit)
    assert filters.with_penalties(mixed, 100) == [filters.with_penalties(both, 100)[i] for i in order]
    selection = filters.selection(both, credit, {7, 4, 18, 15})
    assert 0 < sum(selection.trained) < len(both)
    expected = replace(selection, left_out=[selection.left_out[i] for i in order])
    assert filters.selection(mixed, credit_mixed, {7, 4, 18, 15}) == expected


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_rounds": 0}, "max_rounds=0 plays nothing; use 1 or more"),
        ({"overlong_margin_tokens": -3}, "overlong_margin_tokens=-3 is negative; use 0 for no penalty"),
        ({"overlong_penalty": 0.0}, "overlong_penalty=0.0 is not a positive number; use e.g. 1, or overlong_margin"),
        ({"overlong_penalty": -0.5}, "overlong_penalty=-0.5 is not"),
        ({"overlong_penalty": float("inf")}, "overlong_penalty=inf is not"),
        ({"overlong_penalty": float("nan")}, "overlong_penalty=nan is not"),
    ],
)
def test_what_can_never_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^rollout.filters.{message}"):
        Filters(**settings)


def test_a_margin_larger_than_the_budget_is_refused() -> None:
    PRICED.check(max_new_tokens=40)
    with pytest.raises(ConfigError, match=r"tokens=40 exceeds rollout.limits.max_new_tokens=39,.* use e.g. 7$"):
        PRICED.check(max_new_tokens=39)
    with pytest.raises(ConfigError, match=r"max_new_tokens=3,.* use e.g. 1$"):
        PRICED.check(max_new_tokens=3)


def from_yaml(text: str) -> Filters:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rollout.filters", type=Filters, default=Filters())
    filters = parser.instantiate(parser.parse_string(text)).rollout.filters
    assert isinstance(filters, Filters)
    return filters


def test_every_setting_can_be_written_in_yaml() -> None:
    settings = "max_rounds: 4, at_bound: error, drop_flat_groups: true, mask_overlong: true, mask_max_turns: true, "
    settings += "overlong_margin_tokens: 52, overlong_penalty: 0.7"
    expected = Filters("reward", 4, "error", True, True, True, 52, 0.7)
    assert from_yaml(f"rollout: {{filters: {{dynamic_sampling: reward, {settings}}}}}") == expected
    unsampled = from_yaml(f"rollout: {{filters: {{dynamic_sampling: null, {settings}}}}}")
    assert unsampled == replace(expected, dynamic_sampling=None)
    assert from_yaml("{}") == Filters()


def test_the_page_names_every_setting_and_every_count() -> None:
    section = CREDIT[CREDIT.index("## Which attempts are trained") :]
    for each in (*fields(Filters), *fields(Selection)[1:]):
        assert f"`{each.name}" in section or f"{each.name}: " in section, each.name


def test_the_settings_of_the_page_are_those_of_dapo() -> None:
    section = CREDIT[CREDIT.index("## Which attempts are trained") :]
    text = section.split("```yaml\n")[1].split("```")[0]
    filters = from_yaml(text)
    assert filters == Filters(dynamic_sampling="success", overlong_margin_tokens=4096, overlong_penalty=1.0)
    filters.check(max_new_tokens=20480)
