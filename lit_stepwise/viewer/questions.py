"""What the viewer asks of a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_stepwise.errors import StoreError
from lit_stepwise.viewer.screen import safe

Rows = list[tuple[Any, ...]]


def ask(connection: Any, query: str, *parameters: Any) -> tuple[list[str], Rows]:
    """Names and rows of one query that only reads.

    Raises ``StoreError`` with what DuckDB says, for a person to read.
    """
    import duckdb

    try:
        statements = connection.extract_statements(query)
        kinds = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN}
        if len(statements) != 1 or statements[0].type not in kinds:
            raise StoreError("the store is read with one SELECT; give one, without any other statement")
        result = connection.execute(statements[0], parameters)
        return [column[0] for column in result.description], result.fetchall()
    except duckdb.Error as error:
        raise StoreError(_said(str(error))) from error


def _said(message: str) -> str:
    """The first line of an error of DuckDB, with what it proposes."""
    lines = [line.strip() for line in safe(message).splitlines() if line.strip()]
    hints = [line for line in lines[1:] if line.startswith(("Candidate", "Did you mean"))]
    return "; ".join([*lines[:1], *hints[:1]])


# ---- curves


def curves(connection: Any, names: tuple[str, ...]) -> dict[str, list[float]]:
    """The values of metrics over time; of those that there are."""
    marks = ", ".join("?" * len(names))
    query = (
        f"select name, list(value order by step) from metrics where name in ({marks}) and value is not null group by 1"
    )
    return dict(ask(connection, query, *names)[1])


# ---- tasks


@dataclass(frozen=True, slots=True)
class Change:
    """A task before and after."""

    task_id: str
    before: float
    after: float


def evaluations(connection: Any) -> list[str]:
    """The phases of evaluation, in the order of their weights."""
    query = "select phase from trajectories where stage = 'evaluate' group by phase order by min(policy_version)"
    return [phase for (phase,) in ask(connection, query)[1]]


def accuracy(connection: Any, phase: str) -> dict[str, float]:
    """Of each task in an evaluation: greedy where it was played greedily, else over all attempts."""
    query = """
        with played as (select * from trajectories where phase = ? and stop_reason <> 'failed')
        select task_id, avg(success::int) from played
        where temperature = (select min(temperature) from played) group by task_id"""
    return dict(ask(connection, query, phase)[1])


def training_reward(connection: Any) -> dict[str, float]:
    """Mean reward of each task over all of training."""
    sound = "stage = 'train' and stop_reason <> 'failed'"
    query = f"select task_id, avg(reward) from trajectories where {sound} group by task_id"
    return dict(ask(connection, query)[1])


def changes(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[list[Change], list[Change]]:
    """Tasks of both that got worse, and those that got better; those that changed most first."""
    found = [Change(task, before[task], after[task]) for task in before.keys() & after.keys()]
    found.sort(key=lambda each: (-abs(each.after - each.before), each.task_id))
    return (
        [each for each in found if each.after < each.before - 1e-9],
        [each for each in found if each.after > each.before + 1e-9],
    )
