"""docs/store.md shows the columns as they are, and queries that run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lit_stepwise.store.read import open_run
from lit_stepwise.store.schema import LEARNT, TURNS, Column

DOC = (Path(__file__).parent.parent.parent / "docs" / "store.md").read_text()
QUERIES = re.findall(r"```sql\n(.*?)```", DOC, re.DOTALL)


@pytest.mark.parametrize(("heading", "columns"), [("turns", TURNS), ("learnt", LEARNT)])
def test_the_tables_are_those_of_the_schema(heading: str, columns: tuple[Column, ...]) -> None:
    section = DOC.split(f"## Columns of `{heading}`")[1].split("\n## ")[0]
    shown = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", section, re.MULTILINE)
    assert shown == [tuple(column) for column in columns]


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_runs(query: str, run: Path) -> None:
    open_run(run).execute(query).fetchall()


def test_there_are_queries_to_run_and_they_find_something(run: Path) -> None:
    assert len(QUERIES) == 8
    assert open_run(run).execute(QUERIES[3]).fetchall()[0][-2] == 0.5
