"""The numbers of the charts, worked by hand from a run of two iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_stepwise.report.charts import MAX_BARS, MAX_POINTS, Chart, Series, overlay
from lit_stepwise.report.curves import logged_charts, pass_at
from lit_stepwise.report.play import ATTEMPTS, play_charts, tasks_changed
from lit_stepwise.report.run import config_of, facts, tiles, told
from lit_stepwise.store.find import find_run
from lit_stepwise.store.read import open_run
from lit_stepwise.store.write import StoredPhase, TrajectoryStore
from lit_stepwise.types import Feedback, StopReason, Trajectory, Turn, VersionSpan


def connected(folder: Path) -> Any:
    connection = open_run(folder)
    connection.execute(ATTEMPTS)
    return connection


def drawn(folder: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Of each chart its series by name."""
    connection = connected(folder)
    charts = [*logged_charts(connection), *play_charts(connection)]
    return {chart.title: {each.name: list(each.points) for each in chart.series} for chart in charts}


def test_learning_is_that_of_every_evaluation_and_of_what_was_logged(played: Path) -> None:
    charts = drawn(played)
    assert charts["Accuracy"] == {"validation": [(0, 0.5), (2, 0.5)], "rollout": [(0, 0.75), (1, 0.75)]}
    assert charts["Reward"] == {"validation": [(0, 0.5), (2, 0.5)], "rollout": [(0, 0.75), (1, 1.0)]}
    assert charts["Reward components"] == {"outcome": [(0, 0.5), (1, 1.5)]}
    assert charts["Drift of log-probabilities"] == {"largest": [(0, 0.5), (1, 0.5)]}
    assert "Clipped tokens" not in charts  # it was not logged


def test_play_is_told_by_group_by_turn_and_by_length(played: Path) -> None:
    charts = drawn(played)
    assert charts["Groups"] == {"mixed": [(0, 0.5), (1, 0.5)], "too easy": [(0, 0.5), (1, 0.5)]}
    # group 0 earns 1 + i, a quarter of it in its first turn; group 1 earns 0.5 twice; four trajectories
    assert charts["Which turn earned the reward"] == {
        "turn 0": [(0, (0.25 + 1) / 4), (1, (0.5 + 1) / 4)],
        "turn 1": [(0, 0.75 / 4), (1, 1.5 / 4)],
    }
    assert charts["Turns"] == {"1 turn": [(0, 0.5), (1, 0.5)], "2 turns": [(0, 0.5), (1, 0.5)]}
    assert charts["Drift by turn"] == {"turn 0": [(0, 0.125), (1, 0.125)], "turn 1": [(0, 0.25), (1, 0.25)]}
    assert charts["Response length"]["median"][0] == (0, 6)  # of 4, 4, 5, 7, 8 and many tokens


def test_an_iterations_time_is_what_the_trainer_spent_from_one_wait_to_the_next(played: Path) -> None:
    assert drawn(played)["An iteration's time"] == {
        "waiting for play": [(0, 2.0), (1, 3.0)],
        "training": [(0, 3.0), (1, 3.0)],
    }


def test_optimizer_steps_of_one_iteration_are_added_up(played: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "trajectories").symlink_to(played / "trajectories")
    phases = ("wait", "train", "evaluate", "prepare", "save", "other", "store")  # the last is part of others
    rows = ["0,0,5,1,,,,,16", "0,1,,2,32,,0.5,,16", "1,2,7,4,,0.25,,0.125,16", "1,3,,8,64,,,,16"]
    names = ",".join(["epoch", "step", *(f"seconds/{phase}" for phase in phases)])
    (folder / "metrics.csv").write_text("\n".join([names, *rows]) + "\n")
    charts = drawn(folder)
    assert charts["An iteration's time"] == {
        "waiting for play": [(0, 5.0), (2, 7.0)],
        "preparing": [(2, 0.25)],
        "training": [(0, 3.0), (2, 12.0)],
        "evaluation": [(0, 32.0), (2, 64.0)],
        "checkpoints": [(0, 0.5)],
        "the rest": [(2, 0.125)],
    }


def test_long_runs_are_averaged_and_the_largest_stays_the_largest(played: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "trajectories").symlink_to(played / "trajectories")
    rows = [f"{i},{i},{i},{i % 2},4" for i in range(2 * MAX_POINTS)]
    names = "epoch,step,train/logprob_gap_max,train/entropy,seconds/wait"
    (folder / "metrics.csv").write_text("\n".join([names, *rows]) + "\n")
    charts = drawn(folder)
    assert charts["Entropy"]["entropy"] == [(2 * i, 0.5) for i in range(MAX_POINTS)]
    assert charts["Drift of log-probabilities"]["largest"][-1] == (2 * MAX_POINTS - 2, 2 * MAX_POINTS - 1)
    waits = charts["An iteration's time"]["waiting for play"]
    assert len(waits) <= MAX_BARS
    assert {seconds for _, seconds in waits} == {4.0}


def test_turns_after_the_sixth_are_counted_with_it(tmp_path: Path) -> None:
    turns = [
        Turn([1], [2], [-0.5], [VersionSpan(7, 1)], "", Feedback("", {"outcome": reward}))
        for reward in (0.5, 1.0, 0.0, 0.0, 0.0, 2.0, 4.0, 0.25)
    ]
    store = TrajectoryStore(tmp_path / "trajectories")
    store.write(StoredPhase("train", 7, [Trajectory("a", 0, 0, turns, StopReason.DONE)], 3))
    earned = drawn(tmp_path)["Which turn earned the reward"]
    assert earned["turn 0"] == [(3, 0.5)]
    assert list(earned)[-1] == "turn 5 on"
    assert earned["turn 5 on"] == [(3, 6.25)]


def test_bars_of_a_long_run_stand_for_equal_spans_whatever_is_seen_when(tmp_path: Path, attempts: Any) -> None:
    store = TrajectoryStore(tmp_path / "trajectories")
    for i in range(2 * MAX_BARS):  # one group each, solved in every second iteration
        store.write(StoredPhase("train", 7, attempts([[i % 2 == 1]], greedy=False), i))
    charts = drawn(tmp_path)
    half = [(2 * i, 0.5) for i in range(MAX_BARS)]
    assert charts["Groups"] == {"too hard": half, "too easy": half}
    assert charts["Which turn earned the reward"] == {"turn 0": half}


@pytest.mark.parametrize(
    ("k", "tries", "solved", "expected"), [(1, 4, 1, 0.25), (2, 4, 1, 0.5), (2, 5, 4, 1.0), (3, 3, 0, 0.0)]
)
def test_pass_at_k_is_the_chance_of_a_draw_without_return(k: int, tries: int, solved: int, expected: float) -> None:
    assert pass_at(k, tries, solved) == pytest.approx(expected)


def test_pass_at_k_is_of_the_sampled_attempts_alone(tmp_path: Path, attempts: Any) -> None:
    # of task 0 one of three sampled attempts is right, of task 1 all; both are wrong when played greedily
    sampled = [[False, True, False, False], [False, True, True, True]]
    TrajectoryStore(tmp_path / "trajectories").write(StoredPhase("evaluate", 7, attempts(sampled)))
    charts = drawn(tmp_path)
    assert charts["pass@k"] == {
        "pass@1": [(7, pytest.approx((1 / 3 + 1) / 2))],
        "pass@2": [(7, pytest.approx((2 / 3 + 1) / 2))],
        "pass@3": [(7, 1.0)],
    }
    assert charts["Accuracy"] == {"validation": [(7, 0.0)]}


def test_tasks_that_changed_are_listed_those_that_got_worse_first(played: Path) -> None:
    found = tasks_changed(connected(played))
    assert found["steps"] == [0, 2]
    assert found["counts"] == {"worse": 1, "better": 1, "solved before and after": 0, "neither": 0}
    assert [(row["task"], row["history"]) for row in found["rows"]] == [("v0", [1.0, 0.0]), ("v1", [0.0, 1.0])]


def test_the_head_says_what_was_gained_and_not_where_the_servers_are(played: Path) -> None:
    run = find_run(played)
    config = config_of(run)
    said = {tile.name: tile.value.replace("\N{NO-BREAK SPACE}", " ") for tile in tiles(connected(played))}
    assert said == {
        "Validation accuracy": "50.0 %", "Rollout accuracy": "75.0 %", "Iterations": "2", "Trajectories": "12",
        "Turns": "16",
    }  # fmt: skip
    assert ("loss", "DualClip(low=0.2)") in facts(run, config)
    assert "low: 0.2" in told(config)
    assert "secret" not in told(config) + str(facts(run, config))


def test_lines_of_two_runs_share_a_chart_and_stacks_stand_beside_each_other() -> None:
    lines, bars = Chart("Play", "Lines", "", ""), Chart("Learning", "Bars", "", "", kind="stack")
    runs = [
        [Chart(**{**_fields(each), "series": [Series("s", "c0", [(0, y)])]}) for each in (lines, bars)] for y in (3, 4)
    ]
    found = [(chart.title, [(each.name, each.run, each.points) for each in chart.series]) for chart in overlay(runs)]
    assert found == [
        ("Bars A", [("s A", 0, [(0, 3)])]),
        ("Bars B", [("s B", 1, [(0, 4)])]),
        ("Lines", [("s A", 0, [(0, 3)]), ("s B", 1, [(0, 4)])]),
    ]


def _fields(chart: Chart) -> dict[str, Any]:
    return {name: getattr(chart, name) for name in chart.__slots__}
