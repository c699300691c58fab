"""Tasks in a stateless order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lit_stepwise.errors import ConfigError, DataError
from lit_stepwise.testing import CountdownTasks
from lit_stepwise.training import TaskDataModule


def data(stage: str = "fit", limit: Any = 1.0, **settings: Any) -> TaskDataModule:
    module = TaskDataModule(CountdownTasks(), **{"train_files": "5", "tasks_per_iteration": 3, **settings})
    module.trainer = SimpleNamespace(limit_train_batches=limit)  # type: ignore[assignment]
    module.setup(stage)
    return module


def test_a_dry_run_may_leave_samples_untrained() -> None:
    module = TaskDataModule(CountdownTasks(), train_files="5", tasks_per_iteration=3, mini_batches=3)
    module.trainer = SimpleNamespace(limit_train_batches=1, fast_dev_run=1)  # type: ignore[assignment]
    module.setup("fit")


def ids(module: TaskDataModule, iteration: int) -> list[str]:
    return [task.task_id for task in module.tasks_for(iteration)]


def test_every_sweep_plays_every_task_once_also_across_iterations() -> None:
    played = [task for iteration in range(5) for task in ids(data(), iteration)]
    sweeps = [played[start : start + 5] for start in range(0, 15, 5)]
    assert [sorted(sweep) for sweep in sweeps] == [[f"goal-{goal}" for goal in range(1, 6)]] * 3
    assert len({tuple(sweep) for sweep in sweeps}) == 3


def test_the_order_is_a_function_of_seed_and_iteration_alone() -> None:
    assert ids(data(), 3) == ids(data(), 3)
    assert [ids(data(), i) for i in range(4)] != [ids(data(seed=1), i) for i in range(4)]


def test_further_tasks_are_the_others_each_once_in_an_order_of_their_own() -> None:
    module = data(train_files="40")
    further = [[task.task_id for task in module.further_tasks(iteration)] for iteration in (2, 3)]
    for iteration, found in zip((2, 3), further, strict=True):
        assert sorted([*found, *ids(module, iteration)]) == sorted(f"goal-{goal}" for goal in range(1, 41))
        assert found == [task.task_id for task in data(train_files="40").further_tasks(iteration)]
    orders = [[module.tasks.index(task) for task in module.further_tasks(iteration)] for iteration in (2, 3)]
    ranks = [[sorted(order).index(place) for place in order] for order in orders]
    assert ranks[0] != ranks[1]
    assert further[0] != [task.task_id for task in data(train_files="40", seed=1).further_tasks(2)]


def test_several_files_are_one_set_of_tasks_and_validation_may_be_cut_short() -> None:
    module = data(train_files=["2", "3"], val_files="4", max_val_tasks=3)
    assert [task.task_id for task in module.tasks] == ["goal-1", "goal-2", *["goal-1", "goal-2", "goal-3"] * 2]


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_stage_without_its_files_is_refused(stage: str) -> None:
    name = {"fit": "train", "validate": "val", "test": "test", "predict": "test"}[stage]
    with pytest.raises(ConfigError, match=f"data.{name}_files names no file"):
        data(stage, train_files=None)


def test_files_without_tasks_are_refused() -> None:
    with pytest.raises(DataError, match="holds no task"):
        data(train_files="0")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks_per_iteration": 0}, "data.tasks_per_iteration=0"),
        ({"passes": 0}, "data.passes=0"),
        ({"mini_batches": 4}, "data.mini_batches=4"),
        ({"limit": 0.5}, r"trainer.limit_train_batches=0\.5"),
        ({"mini_batches": 3, "limit": 2}, "trainer.limit_train_batches=2"),
    ],
)
def test_settings_that_would_lose_samples_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data(**settings)


def test_without_a_rollout_callback_there_is_nobody_to_play() -> None:
    with pytest.raises(ConfigError, match="add a RolloutCallback"):
        list(data().train_dataloader())


def test_what_cannot_be_played_is_dealt_out_no_more() -> None:
    module = data(val_files="2")
    module.keep([task for task in module.tasks if task.task_id != "goal-2"])
    assert {task for iteration in range(4) for task in ids(module, iteration)} == {
        "goal-1",
        "goal-3",
        "goal-4",
        "goal-5",
    }
    assert [task.task_id for task in module.tasks] == ["goal-1", "goal-3", "goal-4", "goal-5", "goal-1"]


def test_a_split_without_any_task_left_is_refused_by_name() -> None:
    module = data(val_files="2")
    with pytest.raises(DataError, match=r"data\.val_files=2: none of the 2 tasks can be played"):
        module.keep(module.tasks[:5])


# ---- weights


def places(module: TaskDataModule, iteration: int, weights: list[float]) -> list[int]:
    return [module.training_tasks.index(task) for task in module.tasks_for(iteration, weights)]


def test_with_a_weight_of_one_each_every_task_has_its_turn_as_without_weights() -> None:
    module = data(train_files="7")
    assert [places(module, i, [1.0] * 7) for i in range(9)] == [
        [module.tasks.index(task) for task in module.tasks_for(i)] for i in range(9)
    ]
    assert list(module.further_tasks(2, [1.0] * 7)) == list(module.further_tasks(2))


def test_a_task_without_weight_loses_its_turn_to_another_and_the_others_keep_theirs() -> None:
    module = data(train_files="9")
    for iteration in range(20):
        due, played = places(module, iteration, [1.0] * 9), places(module, iteration, [0.0, 0.0, *[1.0] * 7])
        assert all(new == old for old, new in zip(due, played, strict=True) if old > 1)
        assert 0 not in played
        assert 1 not in played
        assert len(set(played)) == 3
        further = [module.training_tasks.index(task) for task in module.further_tasks(iteration, [0, 0, *[1.0] * 7])]
        assert sorted([*played, *further]) == list(range(2, 9))


def test_a_task_of_a_quarter_of_the_weight_keeps_every_fourth_turn() -> None:
    module = data(train_files="8", tasks_per_iteration=1)
    turns = [i for i in range(3200) if places(module, i, [1.0] * 8) == [3]]
    kept = [i for i in turns if places(module, i, [1.0, 1.0, 1.0, 0.25, 1.0, 1.0, 1.0, 1.0]) == [3]]
    assert len(turns) == 400
    assert len(kept) == pytest.approx(100, abs=27)  # three standard deviations


def test_whose_turn_it_is_instead_is_drawn_in_proportion_to_the_weights() -> None:
    module = data(train_files="3", tasks_per_iteration=1)
    weights = [0.0, 0.2, 0.8]
    instead = [places(module, i, weights) for i in range(3000) if places(module, i, [1.0] * 3) == [0]]
    assert len(instead) == 1000
    assert instead.count([2]) == pytest.approx(800, abs=38)


def test_where_fewer_tasks_have_a_weight_than_an_iteration_plays_some_are_played_twice() -> None:
    module = data(train_files="9", tasks_per_iteration=5)
    assert sorted(places(module, 4, [0.0] * 7 + [1.0, 1.0])) in ([7, 7, 7, 8, 8], [7, 7, 8, 8, 8])
    assert list(module.further_tasks(4, [0.0] * 7 + [1.0, 1.0])) == []
