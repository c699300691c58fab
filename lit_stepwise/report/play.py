"""Charts of what was played: groups, turns, lengths; and how tasks changed between evaluations."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from math import ceil
from typing import Any

from lit_stepwise.report.charts import MAX_BARS, MAX_POINTS, Chart, Series, ordered
from lit_stepwise.store.read import rows_of

MAX_TURNS = 6
"""Of a trajectory; what comes later is counted with the last of them."""

ATTEMPTS = """
create temp table attempts as
select *, temperature = 0 or not bool_or(temperature = 0) over (partition by phase) as greedy from trajectories
"""
"""``trajectories``, computed once; ``greedy``: it counts for the accuracy, as ``val/accuracy`` does."""

TURNS = """
select iteration // ? * ? as x, least(num_turns, ?) as nth, count(*) as number
from attempts where stage = 'train' and stop_reason <> 'failed' group by x, nth order by x
"""

GROUPS = """
select iteration // ? * ? as x, kind, count(*) as number from groups where stage = 'train' group by x, kind order by x
"""

LENGTHS = """
select iteration // ? * ? as x, quantile_cont(num_response_tokens, 0.1) as low, median(num_response_tokens) as middle,
    quantile_cont(num_response_tokens, 0.9) as high, max(num_response_tokens) as largest
from turns where stage = 'train' group by x order by x
"""

EARNED = """
with earned as (
    select iteration // ? * ? as x, least(turn, ?) as nth, sum(reward) as reward
    from turns where stage = 'train' and stop_reason <> 'failed' group by x, nth
), sizes as (
    select iteration // ? * ? as x, count(*) as number
    from attempts where stage = 'train' and stop_reason <> 'failed' group by x
)
select x, nth, reward / number as reward from earned join sizes using (x) order by x
"""

DRIFT = """
select iteration // ? * ? as x, least(turn, ?) as nth, sum(logprob_gap * tokens) / sum(tokens) as gap
from (select iteration, turn, logprob_gap, coalesce(len(trainer_logprobs), 1) as tokens from learnt
    where isfinite(logprob_gap)) group by x, nth order by x
"""

OUTCOMES = """
select task_id, min(policy_version) as step, phase, avg(success::int) as solved
from attempts where stage = 'evaluate' and stop_reason <> 'failed' and greedy
group by task_id, phase order by task_id, step
"""


def play_charts(connection: Any) -> list[Chart]:
    """All of a run; charts that would be empty are left out. ``connection`` has the table ``attempts``."""
    (last,) = connection.execute("select coalesce(max(iteration), 0) from attempts").fetchone()
    bars, points = (ceil((last + 1) / limit) for limit in (MAX_BARS, MAX_POINTS))
    charts = [
        _groups(connection, bars),
        _earned(connection, bars),
        _turns(connection, bars),
        _lengths(connection, points),
        _drift(connection, points),
    ]
    return [replace(chart, x="iteration") for chart in charts if any(each.points for each in chart.series)]


def _groups(connection: Any, width: int) -> Chart:
    shares = _shares(rows_of(connection, GROUPS, width, width), "kind")
    colors = {"too hard": "g1", "mixed": "c0", "too easy": "g0", "failed": "c4"}
    note = "All attempts at one task. Only where some solve it and some do not is there something to compare."
    series = [Series(kind, color, shares[kind]) for kind, color in colors.items() if kind in shares]
    return Chart("Play", "Groups", note, "% of groups", series, kind="stack")


def _earned(connection: Any, width: int) -> Chart:
    rows = rows_of(connection, EARNED, width, width, MAX_TURNS - 1, width, width)
    layers: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        layers[row["nth"]].append((row["x"], row["reward"]))
    note = "Reward paid in each turn, over all trajectories; together they are the reward of a trajectory."
    series = ordered({_turn(turn): layers[turn] for turn in sorted(layers)})
    return Chart("Play", "Which turn earned the reward", note, "reward a trajectory", series, kind="stack")


def _turns(connection: Any, width: int) -> Chart:
    shares = _shares(rows_of(connection, TURNS, width, width, MAX_TURNS), "nth")
    series = ordered({_turns_of(number): shares[number] for number in sorted(shares)})
    return Chart("Play", "Turns", "How many a trajectory took.", "% of trajectories", series, kind="stack")


def _lengths(connection: Any, width: int) -> Chart:
    rows = rows_of(connection, LENGTHS, width, width)
    names = {
        "largest": ("longest", "g0"),
        "high": ("90 % below", "o3"),
        "middle": ("median", "c0"),
        "low": ("10 % below", "o3"),
    }
    series = [Series(name, color, [(row["x"], row[key]) for row in rows]) for key, (name, color) in names.items()]
    return Chart("Play", "Response length", "Tokens sampled in one turn.", "tokens", series)


def _drift(connection: Any, width: int) -> Chart:
    layers: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in rows_of(connection, DRIFT, width, width, MAX_TURNS - 1):
        layers[row["nth"]].append((row["x"], row["gap"]))
    note = "The mean by turn. It grows with the turn where prompts are not what the trainer takes them for."
    series = ordered({_turn(turn): layers[turn] for turn in sorted(layers)})
    return Chart("Engine and trainer", "Drift by turn", note, "nats", series, log=True)


def _shares(rows: list[dict[str, Any]], key: str) -> dict[Any, list[tuple[float, float]]]:
    """Of each kind its share of what is counted at an x."""
    totals: dict[float, float] = defaultdict(float)
    for row in rows:
        totals[row["x"]] += row["number"]
    shares: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        shares[row[key]].append((row["x"], row["number"] / totals[row["x"]]))
    return shares


def _turn(turn: int) -> str:
    """By the number that the store, ``show`` and every question to them have it by."""
    return f"turn {turn}" + " on" * (turn == MAX_TURNS - 1)


def _turns_of(number: int) -> str:
    return f"{number} turn{'s' * (number != 1)}" + " or more" * (number == MAX_TURNS)


def tasks_changed(connection: Any, most: int = 200) -> dict[str, Any]:
    """Tasks that the first and the last evaluation differ in, those that got worse first, and how many there are."""
    histories: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows_of(connection, OUTCOMES):
        histories[row["task_id"]][row["step"]] = row["solved"]
    steps = sorted({step for each in histories.values() for step in each})
    counts = {"worse": 0, "better": 0, "solved before and after": 0, "neither": 0}
    changed = []
    for task, history in histories.items():
        if len(steps) < 2 or not {steps[0], steps[-1]} <= history.keys():
            continue
        before, after = history[steps[0]], history[steps[-1]]
        if before == after:
            counts["solved before and after" if after > 0.5 else "neither"] += 1
            continue
        counts["worse" if after < before else "better"] += 1
        changed.append({"task": task, "gain": after - before, "history": [history.get(step) for step in steps]})
    changed.sort(key=lambda each: (each["gain"], each["task"]))
    return {"steps": steps, "counts": counts, "rows": changed[:most], "left_out": max(len(changed) - most, 0)}
