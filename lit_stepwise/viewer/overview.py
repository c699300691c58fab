"""A run on one screen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_stepwise.store.find import StoredRun
from lit_stepwise.viewer.questions import accuracy, ask, changes, curves, evaluations
from lit_stepwise.viewer.screen import safe, sparkline, table_of
from lit_stepwise.viewer.settings import SHOWN, settings_of

CURVES = (
    "val/accuracy", "test/accuracy", "rollout/accuracy", "rollout/reward", "rollout/turns", "rollout/response_tokens",
    "rollout/format_errors", "train/entropy", "train/loss", "train/logprob_gap",
)  # fmt: skip
TIMES = ("seconds/play", "seconds/wait", "seconds/sync", "seconds/train", "seconds/evaluate", "seconds/store")


def show_overview(console: Console, run: StoredRun, connection: Any) -> None:
    """What it is, how it went, what took the time, and where to look further."""
    for line in _heading(run, connection):
        console.print(Text(safe(line)))
    settings = settings_of(run.folder)
    shown = {name: settings[name] for name in SHOWN if settings.get(name) is not None}
    if shown:
        console.print(Text(safe("  ".join(f"{name}={value}" for name, value in shown.items())), style="dim"))
    found = curves(connection, (*CURVES, *TIMES))
    for table in (_curves(found), _times(found), _groups(connection), _turns(connection), _gaps(connection)):
        if table is not None:
            console.print()
            console.print(table)
    console.print()
    for line in _tasks(connection):
        console.print(Text(safe(line)))
    console.print(Text("look further: --groups, --trajectory TASK, --where 'advantage > 1', --sql 'select ...'", "dim"))


def _heading(run: StoredRun, connection: Any) -> Iterator[str]:
    counts = ask(connection, "select count(*), sum(num_turns), count(distinct iteration) from trajectories")[1][0]
    trajectories, turns, iterations = counts
    size = run.num_bytes / 2**20
    yield (
        f"{run.folder}: {iterations} iterations, {trajectories:,} trajectories, {int(turns):,} turns; "
        f"store of {size:,.1f} MiB"
    )
    for later, part in zip(run.parts, run.parts[1:], strict=False):
        yield f"{later.name} went on from {part.name} at step {part.before_step}"
    yield from notes(run)


def notes(run: StoredRun) -> Iterator[str]:
    """What could not be read."""
    for path in run.broken:
        yield f"{path.name} is not whole and is passed over"
    if run.missing is not None:
        yield f"the run that it went on from is not at {run.missing}, so what follows begins where it resumed"


def _curves(found: dict[str, list[float]]) -> Table | None:
    rows = [
        (name, values[0], values[-1], min(values), max(values), sparkline(values))
        for name in CURVES
        if (values := found.get(name))
    ]
    return table_of(("metric", "first", "last", "least", "most", "over time"), rows) if rows else None


def _times(found: dict[str, list[float]]) -> Table | None:
    totals = {name: sum(found[name]) for name in TIMES if name in found}
    if not totals:
        return None
    played, waited = totals.get("seconds/play", 0.0), totals.pop("seconds/wait", math.inf)
    if waited < 0.9 * played:  # play went on beside training; the sync is in what the trainer waited
        del totals["seconds/play"]
        totals = {"seconds/wait": max(waited - totals.get("seconds/sync", 0.0), 0.0)} | totals
    everything = sum(totals.values())
    rows = [(name, totals[name], f"{totals[name] / everything:.0%}") for name in totals]
    return table_of(("time", "seconds", "share"), rows)


def _groups(connection: Any) -> Table | None:
    query = """
        select phase as "groups of", count(*) as groups, count(*) filter (kind = 'too easy') as "too easy",
            count(*) filter (kind = 'mixed') as mixed, count(*) filter (kind = 'too hard') as "too hard",
            count(*) filter (kind = 'failed') as failed, count(*) filter (trained) as trained
        from groups where stage = 'train' and iteration in
            (select unnest([min(iteration), max(iteration)]) from trajectories where stage = 'train')
        group by phase order by phase"""
    names, rows = ask(connection, query)
    return table_of(names, rows) if rows else None


def _turns(connection: Any) -> Table | None:
    """Which turn earns the reward."""
    query = """
        select turn, count(*) as played, avg(reward) as reward, avg(advantage) as advantage,
            sum(reward) / nullif(sum(sum(reward)) over (), 0) as "share of reward",
            avg(format_error::int) as "format errors", avg(num_response_tokens) as "response tokens"
        from played where stage = 'train' and turn is not null group by turn order by turn limit 12"""
    names, rows = ask(connection, query)
    return table_of(names, rows) if rows else None


def _gaps(connection: Any) -> Table | None:
    """Where engine and trainer disagree."""
    query = """
        select printf('train-%06d/%d/%d', iteration, group_id, sample) as "engine and trainer are furthest apart in",
            turn, logprob_gap_max as "nats, largest", logprob_gap as mean
        from learnt where pass_index = 0 order by logprob_gap_max desc nulls last limit 3"""
    names, rows = ask(connection, query)
    return table_of(names, rows) if rows else None


def _tasks(connection: Any) -> Iterator[str]:
    """Which tasks got worse."""
    phases = evaluations(connection)
    if len(phases) < 2:
        return
    worse, better = changes(accuracy(connection, phases[0]), accuracy(connection, phases[-1]))
    yield f"from {phases[0]} to {phases[-1]}: {len(better)} tasks got better, {len(worse)} worse"
    if worse:
        names = ", ".join(each.task_id for each in worse[:8])
        yield f"worse: {names}{f' and {len(worse) - 8} more' if len(worse) > 8 else ''}"
