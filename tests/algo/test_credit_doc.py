"""The numbers of docs/credit.md and of benchmarks/results/credit.txt, computed again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.credit import ESTIMATORS, label, line, turn_factors
from benchmarks.toy_mdps import attempts_at, moments, policy_gradient, stopping
from lit_stepwise import algo
from lit_stepwise.types import Feedback, StopReason, Trajectory, Turn, VersionSpan

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "credit.md").read_text()
RESULTS = (ROOT / "benchmarks" / "results" / "credit.txt").read_text()


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose head begins so."""
    table = TEXT[TEXT.index(head) :].split("\n\n")[0]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


def group_of_the_example() -> list[Trajectory]:
    group = []
    for name, *turns, total in rows("| attempt | turn 0"):
        played = []
        for cell in filter(None, turns):
            _, reward, *state = (word.strip(" `") for word in cell.split(","))
            feedback = Feedback("", {"r": float(reward)}, state_key=state[0] if state else None)
            played.append(Turn([1], [2], [-0.5], [VersionSpan(0, 1)], "", feedback))
        group.append(Trajectory(f"task of {name}", 0, len(group), played, StopReason.DONE))
        assert f"{group[-1].reward:.2f}" == total
    return group


def advantages_of_the_example(estimator: str) -> list[str]:
    """As printed: to two places, without the sign of a zero."""
    values = eval(estimator, vars(algo))(group_of_the_example())
    return [f"{x:.2f}".replace("-0.00", "0.00") for row in values for x in row]


@pytest.mark.parametrize("row", rows("| estimator | A0"), ids=lambda row: row[0])
def test_the_example_shows_what_each_estimator_gives(row: list[str]) -> None:
    assert row[1:] == advantages_of_the_example(row[0])


def test_the_example_spells_out_where_its_numbers_come_from() -> None:
    group = group_of_the_example()
    assert [len(trajectory.turns) for trajectory in group] == [3, 3, 1, 2]
    a, b, c, d = (trajectory.reward for trajectory in group)
    assert [(a + b + c + d) / 4, b + c + d, a + c + d] == pytest.approx([0.60, 0.70, 2.60])
    assert algo.TurnReturn(norm_by_std=False)(group)[0][1] == pytest.approx(1.80 - 0.6875)
    assert algo.GiGPO(discount=1.0)(group)[0][2] == pytest.approx(1.10 + 0.75)
    by_state = algo.StateValueGAE(trace=0.0)(group)
    assert by_state[0][2] == pytest.approx(2.00 - (0.50 + 0.70 / 3) / 2)
    assert by_state[1][1] == pytest.approx(-0.40 + 2.00 - 2.60 / 3)


@pytest.mark.parametrize("row", rows("| estimator | lowest factor"), ids=lambda row: row[0])
def test_the_quoted_factors_are_those_of_the_benchmark(row: list[str]) -> None:
    table = RESULTS[RESULTS.index("looking up, groups of 4") :].split("\n\n")[0]
    found = next(each for each in table.splitlines() if each.startswith(f"  {row[0]} "))
    assert row[1:] == found.removeprefix(f"  {row[0]}").split()[1:]


def test_the_quoted_noise_of_large_groups_is_that_of_the_benchmark() -> None:
    table = RESULTS[RESULTS.index("looking up, groups of 16") :]
    quoted = re.findall(r"(\d\.\d{3})\s+for\s+`(.*?)`", TEXT)
    assert len(quoted) == 3
    for noise, estimator in quoted:
        assert re.search(rf"{re.escape(estimator)} +{noise} \+-", table)


def test_the_results_of_the_benchmark_are_those_of_this_code() -> None:
    for each in turn_factors():
        assert each in RESULTS
    attempts, exact = attempts_at(stopping()), policy_gradient(stopping())
    table = RESULTS[RESULTS.index("stopping, groups of 4") :].split("\n\n")[0]
    for estimator in ESTIMATORS:
        assert f"  {label(estimator):44}{line(moments(attempts, estimator, 4), exact)}" in table


def test_the_quoted_weights_of_the_turns_are_those_of_the_benchmark() -> None:
    ended_as_zero, survivors = ([float(x) for x in each.split()[-3:]] for each in turn_factors() if "n = 4" in each)
    for weights in (survivors, ended_as_zero):
        assert ", ".join(f"{weight:.3f}" for weight in weights) in TEXT.replace("\n ", "")


def test_the_estimator_of_your_own_works_as_it_stands() -> None:
    code = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0]
    names: dict[str, Any] = {"__name__": "my_credit"}
    exec(code, names)
    won = Turn([1], [2], [-0.5], [VersionSpan(0, 1)], "", Feedback("", done=True, success=True))
    lost = Turn([1], [2], [-0.5], [VersionSpan(0, 1)], "", Feedback("", done=True))
    group = [Trajectory("task", 0, i, turns, StopReason.DONE) for i, turns in enumerate([[lost, won], [lost], [lost]])]
    values = names["Solved"]()(group)
    assert [x for row in values for x in row] == pytest.approx([2 / 3, 2 / 3, -1 / 3, -1 / 3])
