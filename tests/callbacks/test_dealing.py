"""Which tasks and how many turns the callbacks of the gallery deal out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from callbacks.curriculum import Curriculum
from callbacks.prompt_warmup import PromptWarmup
from callbacks.turn_budget import TurnBudget
from lit_stepwise.errors import ConfigError
from lit_stepwise.testing import CountdownTasks
from lit_stepwise.types import Deal


def deal(iteration: int = 0, weights: tuple[float, ...] = (1.0, 1.0, 1.0), max_turns: int = 9) -> Deal:
    return Deal(iteration, CountdownTasks().read("3"), [30, 10, 20], list(weights), max_turns)


def played(**outcomes: str) -> list[Any]:
    """Attempts at ``goal_<n>``: + solved, - not, ! failed by our fault."""
    return [
        SimpleNamespace(group=group, task_id=name.replace("_", "-"), success=outcome == "+", failed=outcome == "!")
        for group, (name, attempts) in enumerate(outcomes.items())
        for outcome in attempts
    ]


def weights_after(curriculum: Curriculum, *iterations: list[Any]) -> list[float]:
    for trajectories in iterations:
        curriculum.on_selection(trajectories)
    dealt = deal(weights=(1.0, 0.5, 1.0))
    curriculum.on_deal(dealt)
    return dealt.weights


# ---- curriculum


def test_tasks_always_or_never_solved_so_often_in_a_row_weigh_less_and_the_rest_as_before() -> None:
    curriculum = Curriculum(easy_weight=0.25, hard_weight=0.125, patience=2)
    assert weights_after(curriculum, played(goal_1="++", goal_2="--", goal_3="+-")) == [1.0, 0.5, 1.0]
    assert weights_after(curriculum, played(goal_1="+++", goal_2="--")) == [0.25, 0.0625, 1.0]


def test_a_mixed_group_or_one_of_the_other_kind_begins_anew_and_a_failed_attempt_says_nothing() -> None:
    curriculum = Curriculum(easy_weight=0.25, hard_weight=0.125, patience=2)
    easy = played(goal_1="++", goal_2="++", goal_3="+!")
    assert weights_after(curriculum, easy, easy, played(goal_3="!!")) == [0.25, 0.125, 0.25]
    assert weights_after(curriculum, played(goal_1="+-", goal_2="--")) == [1.0, 0.5, 0.25]
    assert curriculum.streaks == {"goal-1": 0, "goal-2": -1, "goal-3": 2}


def test_a_curriculum_goes_on_from_its_state() -> None:
    first, second = (Curriculum(patience=1, hard_weight=0.5) for _ in range(2))
    weights_after(first, played(goal_3="--"))
    second.load_state_dict(first.state_dict())
    assert weights_after(second) == weights_after(first) == [1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"easy_weight": 0.0}, r"easy_weight=0\.0 is not in"),
        ({"hard_weight": 1.5}, r"hard_weight=1\.5 is not in"),
        ({"patience": 0}, "patience=0"),
    ],
)
def test_a_curriculum_that_would_drop_tasks_for_good_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Curriculum(**settings)


# ---- prompts


def test_the_share_of_tasks_that_are_short_enough_grows_to_all_of_them() -> None:
    warmup = PromptWarmup(first_share=0.25, num_iterations=3)
    lengths = [*range(10, 18), 50, 60, 60, 70]
    # shares 1/4, 1/2, 3/4, 1 and 1 of twelve tasks
    assert [warmup.longest(iteration, lengths) for iteration in range(5)] == [12, 15, 50, 70, 70]


def test_a_task_whose_prompt_is_too_long_yet_has_no_weight_and_the_others_keep_theirs() -> None:
    warmup = PromptWarmup(first_share=0.5, num_iterations=10)
    dealt = deal(weights=(0.5, 0.25, 0.125))
    warmup.on_deal(dealt)
    assert dealt.weights == [0.0, 0.25, 0.125]
    dealt = deal(iteration=10, weights=(0.5, 0.25, 0.125))
    warmup.on_deal(dealt)
    assert dealt.weights == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("settings", [{"first_share": 0.0}, {"first_share": 1.5}, {"num_iterations": 0}])
def test_a_warm_up_without_tasks_or_time_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"PromptWarmup {next(iter(settings))}="):
        PromptWarmup(**settings)


# ---- turns


def budget(max_turns: int, **settings: Any) -> TurnBudget:
    from lit_stepwise.algo import GroupRelative
    from lit_stepwise.rollout import RolloutCallback
    from lit_stepwise.testing import Countdown, ScriptedEngine
    from lit_stepwise.types import Limits

    limits = Limits(max_turns=max_turns)
    rollout = RolloutCallback(ScriptedEngine(lambda request: []), Countdown(), GroupRelative(), limits=limits)
    callback = TurnBudget(**settings)
    callback.setup(SimpleNamespace(callbacks=[callback, rollout]), None, "fit")  # type: ignore[arg-type]
    return callback


def test_the_number_of_turns_grows_to_that_of_the_limits_and_stays_there() -> None:
    callback = budget(max_turns=7, first_max_turns=2, num_iterations=4)
    # 2 + 5 i / 4, rounded down
    assert [callback.max_turns(iteration) for iteration in range(6)] == [2, 3, 4, 5, 7, 7]


def test_a_smaller_number_of_turns_that_another_callback_set_holds() -> None:
    callback = budget(max_turns=7, first_max_turns=3, num_iterations=4)
    found = []
    for most in (2, 7):
        dealt = deal(max_turns=most)
        callback.on_deal(dealt)
        found.append(dealt.max_turns)
    assert found == [2, 3]


def test_a_budget_that_cannot_grow_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"first_max_turns=4 cannot grow to rollout\.limits\.max_turns=3"):
        budget(max_turns=3, first_max_turns=4)
    with pytest.raises(ConfigError, match="num_iterations=0"):
        TurnBudget(num_iterations=0)
