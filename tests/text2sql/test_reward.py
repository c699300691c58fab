"""Rewards of turns, component by component; every amount differs, so that no two can be mixed up unseen."""

from __future__ import annotations

import pytest

from lit_stepwise.errors import ConfigError
from lit_stepwise.text2sql.reward import ExecutionReward
from lit_stepwise.types import QueryResult, SQLTurn

REWARD = ExecutionReward(correct=1.5, wrong=-0.3, unfinished=-0.7, format_error=-0.4, query_error=-0.15)
RAN = QueryResult("ok", ("n",), [(1,)])
FAILED = QueryResult("error", error="no such column: n")


def turn(query: QueryResult | None = RAN, solution: bool = False, correct: bool = False, last: bool = False) -> SQLTurn:
    return SQLTurn(query=query, is_solution=solution, correct=correct, format_error=query is None, last=last)


@pytest.mark.parametrize(
    ("played", "answer", "form", "query"),
    [
        (turn(), 0.0, 0.0, 0.0),
        (turn(FAILED), 0.0, 0.0, -0.15),
        (turn(None), 0.0, -0.4, 0.0),
        (turn(solution=True, correct=True, last=True), 1.5, 0.0, 0.0),
        (turn(solution=True, last=True), -0.3, 0.0, 0.0),
        (turn(FAILED, solution=True, last=True), -0.3, 0.0, -0.15),
        (turn(last=True), -0.7, 0.0, 0.0),
        (turn(FAILED, last=True), -0.7, 0.0, -0.15),
        (turn(None, last=True), -0.7, -0.4, 0.0),
    ],
)
def test_each_component_has_its_amount_or_zero(played, answer, form, query):
    assert REWARD(played) == {"answer": answer, "format": form, "query": query}


@pytest.mark.parametrize("status", ["error", "denied", "timeout", "limit"])
def test_whatever_did_not_run_costs_the_same(status):
    assert REWARD(turn(QueryResult(status)))["query"] == -0.15


def test_by_default_an_attempt_is_better_than_none_and_being_right_is_best():
    reward = ExecutionReward()
    right, wrong, none = (
        sum(reward(each).values())
        for each in (turn(solution=True, correct=True, last=True), turn(solution=True, last=True), turn(last=True))
    )
    assert right == 1.0
    assert right > wrong > none


@pytest.mark.parametrize("amounts", [{"correct": 0.2, "wrong": 0.2}, {"unfinished": 1.0}])
def test_a_reward_under_which_being_right_does_not_pay_is_refused(amounts):
    with pytest.raises(ConfigError, match=r"environment\.reward\.correct="):
        ExecutionReward(**amounts)
