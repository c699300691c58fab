"""Two runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_stepwise.store.find import StoredRun
from lit_stepwise.viewer.overview import CURVES
from lit_stepwise.viewer.questions import Change, accuracy, ask, changes, curves, evaluations, training_reward
from lit_stepwise.viewer.screen import safe, sparkline, table_of
from lit_stepwise.viewer.settings import settings_of


def show_comparison(
    console: Console, runs: tuple[StoredRun, StoredRun], connections: tuple[Any, Any], limit: int
) -> None:
    """Curves, lengths, tasks and settings in which they differ."""
    for name, run in zip("AB", runs, strict=True):
        console.print(Text(safe(f"{name}: {run.folder}"), style="bold"))
    for part in (_curves(connections), _lengths(connections)):
        console.print()
        console.print(part)
    _tasks(console, connections, limit)
    console.print()
    console.print(_settings(runs))


def _curves(connections: tuple[Any, Any]) -> Table:
    ours, theirs = (curves(connection, CURVES) for connection in connections)
    rows = []
    for name in CURVES:
        a, b = ours.get(name, []), theirs.get(name, [])
        if a or b:
            last = [values[-1] if values else None for values in (a, b)]
            best = [max(values, default=None) for values in (a, b)]
            difference = b[-1] - a[-1] if a and b else None
            rows.append((name, *last, difference, *best, sparkline(a), sparkline(b)))
    return table_of(("metric", "last A", "last B", "B - A", "most A", "most B", "A over time", "B over time"), rows)


def _lengths(connections: tuple[Any, Any]) -> Table:
    query = """
        with phases as (
            select stage, max_by(phase, policy_version) as phase from trajectories group by stage
        ), played as (
            select * from trajectories semi join phases using (stage, phase)
            where stop_reason <> 'failed'
            qualify stage <> 'evaluate' or temperature = min(temperature) over (partition by stage)
        )
        select stage || ', newest', avg(num_turns), sum(num_response_tokens) / nullif(sum(num_turns), 0),
            avg(num_response_tokens)
        from played group by stage order by stage desc"""
    ours, theirs = ({row[0]: row[1:] for row in ask(connection, query)[1]} for connection in connections)
    names = ("turns", "response tokens a turn", "response tokens a trajectory")
    rows = [
        (stage, name, ours.get(stage, (None,) * 3)[i], theirs.get(stage, (None,) * 3)[i])
        for stage in sorted(ours.keys() | theirs.keys(), reverse=True)
        for i, name in enumerate(names)
    ]
    return table_of(("play", "mean of", "A", "B"), rows)


def _tasks(console: Console, connections: tuple[Any, Any], limit: int) -> None:
    last = [phases[-1] if (phases := evaluations(connection)) else None for connection in connections]
    if last[0] and last[1]:
        found = [accuracy(connection, phase) for connection, phase in zip(connections, last, strict=True) if phase]
        _changes(console, f"accuracy in the last evaluation ({last[0]} of A, {last[1]} of B)", found, limit)
    rewards = [training_reward(connection) for connection in connections]
    _changes(console, "mean reward in training", rewards, limit)


def _changes(console: Console, title: str, found: Sequence[Mapping[str, float]], limit: int) -> None:
    worse, better = changes(found[0], found[1])
    common = len(found[0].keys() & found[1].keys())
    counts = f"of {common} tasks of both, B is worse at {len(worse)} and better at {len(better)}"
    console.print()
    console.print(Text(safe(f"{title}: {counts}")))
    rows = [*_rows("worse", worse[:limit]), *_rows("better", better[:limit])]
    if rows:
        console.print(table_of(("B is", "task", "A", "B"), rows))


def _rows(word: str, tasks: Sequence[Change]) -> list[tuple[str, str, float, float]]:
    return [(word, each.task_id, each.before, each.after) for each in tasks]


def _settings(runs: tuple[StoredRun, StoredRun]) -> Table | Text:
    ours, theirs = (settings_of(run.folder) for run in runs)
    if not ours or not theirs:
        return Text("settings: not compared, for a run has no config.yaml")
    rows = [
        (name, str(ours.get(name, "")), str(theirs.get(name, "")))
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    return table_of(("setting", "A", "B"), rows) if rows else Text("settings: the same")
