"""Reads a run's store: DuckDB over its Parquet files, as views.

::

    turns          a row a turn; with trainer_logprobs, logprob_gap, logprob_gap_max and trained_at where it was trained
    trajectories   a row a trajectory
    groups         a row a group: all attempts at one task in one phase of play
    learnt         a row for each turn of each optimizer step
    metrics        (step, name, value): what a CSVLogger wrote, or else the same names from the store
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_stepwise.errors import StoreError
from lit_stepwise.store.find import Kind, StoredRun, find_run
from lit_stepwise.store.schema import KEY, LEARNT, TURNS, Column

LEARNT_ADDS = [column.name for column in LEARNT if column.name not in (*KEY, "pass_index")]
"""Columns that ``turns`` has of ``learnt``."""

TRAJECTORIES = """
select run, phase, stage, iteration, min(policy_version) as policy_version, any_value(task_id) as task_id,
    group_id, sample, any_value(num_turns) as num_turns, any_value(success) as success,
    coalesce(sum(reward), 0) as reward, any_value(stop_reason) as stop_reason, any_value(failure) as failure,
    any_value(temperature) as temperature, any_value(trained) as trained, any_value(left_out) as left_out,
    coalesce(sum(num_response_tokens), 0)::bigint as num_response_tokens,
    coalesce(sum(format_error::int), 0)::int as num_format_errors, min(advantage) as min_advantage,
    max(advantage) as max_advantage, sum(engine_seconds) as engine_seconds,
    sum(environment_seconds) as environment_seconds
from played group by run, phase, stage, iteration, group_id, sample
"""

GROUPS = """
select run, phase, stage, iteration, min(policy_version) as policy_version, any_value(task_id) as task_id, group_id,
    count(*) as attempts, avg(reward) filter (stop_reason <> 'failed') as reward,
    avg(success::int) filter (stop_reason <> 'failed') as solved,
    case min(success::int) filter (stop_reason <> 'failed') + max(success::int) filter (stop_reason <> 'failed')
        when 0 then 'too hard' when 1 then 'mixed' when 2 then 'too easy' else 'failed' end as kind,
    avg(num_turns) as num_turns, bool_or(trained) as trained
from trajectories group by run, phase, stage, iteration, group_id
"""

COMPUTED = """
with rollout as (
    select min(policy_version) as step, avg(reward) as reward, avg(success::int) as accuracy, avg(num_turns) as turns,
        sum(num_format_errors) / greatest(sum(num_turns), 1) as format_errors,
        sum(num_response_tokens) / greatest(sum(num_turns), 1) as response_tokens, stage
    from trajectories where stop_reason <> 'failed' and (stage = 'train' or temperature = 0)
    group by phase, stage
), named as (unpivot rollout on reward, accuracy, turns, format_errors, response_tokens into name name value value)
select step, if(stage = 'train', 'rollout/', 'val/') || name as name, value from named
union all
select trained_at, 'train/logprob_gap', avg(logprob_gap) from learnt group by trained_at
"""


def open_run(run: str | Path | StoredRun, many_questions: bool = False) -> Any:
    """A DuckDB connection with the views; it reads the run's files and nothing else, and writes nowhere.

    Args:
        run: where it is.
        many_questions: put the trajectories together once, instead of anew for each question about them or groups.

    Raises ``StoreError`` when there is no run at that path, or none that can be read.
    """
    import duckdb

    found = run if isinstance(run, StoredRun) else find_run(run)
    connection = duckdb.connect()
    connection.execute("set parquet_metadata_cache=true")  # a file never changes, and every question reads all footers
    connection.execute("set dynamic_or_filter_threshold=200")  # a join with so few iterations reads their files alone
    played = _union(found, "play", TURNS)
    learnt = _union(found, "learnt", LEARNT)
    adds = ", ".join(f"learnt.{name}" for name in LEARNT_ADDS)
    on = " and ".join(f"played.{name} = learnt.{name}" for name in KEY)
    views = {
        "played": played,
        "learnt": learnt,
        "turns": f"select played.*, {adds} from played left join learnt on {on} and pass_index = 0 "
        "where played.turn is not null",
        "trajectories": TRAJECTORIES,
        "groups": GROUPS,
        "metrics": _logged(found) or COMPUTED,
    }
    try:
        for name, query in views.items():
            kind = "table" if many_questions and name == "trajectories" else "view"
            connection.execute(f"create {kind} {name} as {query}")
    except duckdb.Error as error:
        raise StoreError(f"{found.folder} cannot be read: {str(error).splitlines()[0]}") from error
    _lock(connection, found)
    return connection


def rows_of(connection: Any, query: str, *parameters: Any) -> list[dict[str, Any]]:
    """What a query gives, as a dictionary a row."""
    result = connection.execute(query, parameters)
    names = [column[0] for column in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def _union(run: StoredRun, kind: Kind, columns: tuple[Column, ...]) -> str:
    """All files of a kind as one table with a column ``run`` in front; an empty one where there are none."""
    by_run: dict[str, list[Path]] = {}
    for name, path in run.files(kind):
        by_run.setdefault(name, []).append(path)
    if not by_run:
        empty = ", ".join(f'null::{column.type} as "{column.name}"' for column in columns)
        return f"select null::VARCHAR as run, {empty} where false"
    parts = [
        f"select {_quoted(name)} as run, * from read_parquet([{', '.join(_quoted(path) for path in paths)}])"
        for name, paths in by_run.items()
    ]
    return " union all ".join(parts)


def _logged(run: StoredRun) -> str:
    """What a CSVLogger wrote, of each ancestor up to where its successor went on; empty where there is no such file."""
    parts = []
    for part in run.parts:
        path = part.folder.parent / "metrics.csv"
        if path.is_file() and path.stat().st_size:
            # a run may be writing its last line
            read = f"read_csv({_quoted(path)}, header=true, all_varchar=true, ignore_errors=true, null_padding=true)"
            names = "columns(lambda name: name not in ('step', 'epoch'))"  # a mere evaluation has no epoch
            parts.append(
                f"select try_cast(step as int) as step, name, try_cast(value as double) as value from "
                f"(unpivot (select * from {read}) on {names} into name name value value) "
                f"where value is not null and try_cast(step as int) < {part.before_step}"
            )
    return " union all ".join(parts)


def _lock(connection: Any, run: StoredRun) -> None:
    folders = sorted({str(each.resolve()) for part in run.parts for each in (part.folder, part.folder.parent)})
    connection.execute(f"set allowed_directories=[{', '.join(_quoted(folder) for folder in folders)}]")
    connection.execute("set enable_external_access=false")
    connection.execute("set lock_configuration=true")


def _quoted(text: str | Path) -> str:
    return "'" + str(text).replace("'", "''") + "'"
