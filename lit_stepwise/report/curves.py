"""Charts of what a run logged: learning, the update, and where the time went."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from math import ceil, comb
from typing import Any

from lit_stepwise.report.charts import MAX_BARS, MAX_POINTS, Chart, Series, ordered
from lit_stepwise.store.read import rows_of

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """A metric, and what it is called in a chart."""

    metric: str
    name: str
    color: str
    largest: bool = False
    """Of a span of steps the largest value counts, not the mean."""


LOGGED = (
    (
        Chart(
            "Play",
            "How trajectories ended",
            "Done: the environment said so. Failed: a fault of ours.",
            "% of trajectories",
        ),
        Line("rollout/stopped_done", "done", "c0"),
        Line("rollout/stopped_max_turns", "out of turns", "c1"),
        Line("rollout/stopped_context", "out of context", "c3"),
        Line("rollout/failed", "failed", "c4"),
    ),
    (
        Chart("Play", "Format errors", "Responses without an action that could be understood.", "% of turns"),
        Line("rollout/format_errors", "rollout", "c0"),
    ),
    (
        Chart(
            "Update",
            "Clipped tokens",
            "Whose ratio left the trusted range, by branch of the loss.",
            "% of trained tokens",
        ),
        Line("train/clip_high_fraction", "high", "c0"),
        Line("train/clip_low_fraction", "low", "c1"),
        Line("train/dual_clip_fraction", "dual", "c3"),
    ),
    (
        Chart("Update", "Entropy", "Of the next token, mean over trained tokens; near 0 nothing new is tried.", "nats"),
        Line("train/entropy", "entropy", "c0"),
    ),
    (
        Chart("Update", "Gradient norm", "Before clipping.", "2-norm"),
        Line("train/grad_norm", "norm", "c0"),
    ),
    (
        Chart("Update", "Distance from the reference", "Estimated KL divergence.", "nats"),
        Line("train/kl", "KL", "c0"),
    ),
    (
        Chart("Update", "Learning rate", "Of the first group of parameters.", "rate"),
        Line("train/lr", "rate", "c0"),
    ),
    (
        Chart(
            "Engine and trainer",
            "Drift of log-probabilities",
            "How far engine and trainer are apart on the same tokens before the update; next to nothing if both hold "
            "equal weights.",
            "nats",
            log=True,
        ),
        Line("train/logprob_gap_max", "largest", "g0", largest=True),
        Line("train/logprob_gap_p99", "99th percentile", "c1"),
        Line("train/logprob_gap", "mean", "c0"),
    ),
    (
        Chart(
            "Time",
            "Inside play",
            "In the engine; in the environment, summed over its threads; handing over weights.",
            "seconds an iteration",
        ),
        Line("seconds/engine", "engine", "c0"),
        Line("seconds/environment", "environment", "c1"),
        Line("seconds/sync", "weight sync", "c3"),
    ),
)
"""Charts that are metrics and nothing else: the chart without its series, and what they are."""

METRICS = """
select name, min(step) as step, avg(value) as mean, max(value) as largest
from metrics where isfinite(value) and step is not null group by name, step // ? order by name, step
"""

EVALUATIONS = """
select min(policy_version) as step, avg(success::int) as accuracy, avg(reward) as reward
from attempts where stage = 'evaluate' and stop_reason <> 'failed' and greedy group by phase order by step
"""

SAMPLED = """
with tasks as (
    select phase, min(policy_version) as step, count(*) as tries, sum(success::int) as solved from attempts
    where stage = 'evaluate' and stop_reason <> 'failed' and temperature > 0 group by phase, group_id
)
select min(step) as step, tries::int as tries, solved::int as solved, count(*) as tasks
from tasks group by phase, tries, solved order by step
"""

CYCLES = """
with began as (select distinct step from metrics where name = 'seconds/wait'),
numbered as (select step, row_number() over (order by step) - 1 as i, count(*) over () as total from began),
binned as (select step, i // greatest(ceil(total / ?), 1)::int as bin from numbered),
sizes as (select bin, min(step) as first, count(*) as number from binned group by bin)
select first as step, name, sum(value) / any_value(number) as seconds
from metrics asof join binned on metrics.step >= binned.step join sizes using (bin)
where name in (select unnest(?)) and isfinite(value)
group by first, name order by first
"""
"""An iteration begins where the trainer waited for its play."""


def logged_charts(connection: Any) -> list[Chart]:
    """All of a run; charts that would be empty are left out. ``connection`` has the table ``attempts``."""
    metrics = _metrics(connection)
    charts = [*_learning(connection, metrics), *_cycles(connection)]
    for chart, *lines in LOGGED:
        known = [line for line in lines if line.metric in metrics]
        series = [Series(line.name, line.color, _points(metrics[line.metric], line)) for line in known]
        charts.append(replace(chart, series=series))
    return [chart for chart in charts if any(each.points for each in chart.series)]


def pass_at(k: int, tries: int, solved: int) -> float:
    """Chance that one of ``k`` attempts solves the task, drawn from ``tries`` of which ``solved`` did.

    Unbiased (arXiv:2107.03374, eq. 1).
    """
    return 1 - comb(tries - solved, k) / comb(tries, k)


def _metrics(connection: Any) -> dict[str, list[dict[str, Any]]]:
    (last,) = connection.execute("select coalesce(max(step), 0) from metrics").fetchone()
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows_of(connection, METRICS, ceil((last + 1) / MAX_POINTS)):
        found[row["name"]].append(row)
    return found


def _points(rows: list[dict[str, Any]], line: Line) -> Points:
    return [(row["step"], row["largest" if line.largest else "mean"]) for row in rows]


def _learning(connection: Any, metrics: dict[str, list[dict[str, Any]]]) -> list[Chart]:
    evaluations = rows_of(connection, EVALUATIONS)
    accuracy = Chart("Learning", "Accuracy", "Trajectories that solved their task; validation is greedy.", "% solved")
    reward = Chart("Learning", "Reward", "What the environment paid, mean over trajectories.", "reward a trajectory")
    charts = []
    for chart, name in ((accuracy, "accuracy"), (reward, "reward")):
        validation = Series("validation", "c0", [(row["step"], row[name]) for row in evaluations])
        rollout = Series("rollout", "c1", [(row["step"], row["mean"]) for row in metrics.get(f"rollout/{name}", ())])
        charts.append(replace(chart, series=[each for each in (validation, rollout) if each.points]))
    parts = {
        name.removeprefix("rollout/reward_"): name for name in sorted(metrics) if name.startswith("rollout/reward_")
    }
    components = ordered(
        {name: [(row["step"], row["mean"]) for row in metrics[key]] for name, key in parts.items()}, "c"
    )
    note = "The parts that the reward of training is the sum of."
    charts.insert(1, _pass_at(connection))
    return [*charts, Chart("Learning", "Reward components", note, "reward a trajectory", components)]


def _pass_at(connection: Any) -> Chart:
    rows = rows_of(connection, SAMPLED)
    most = max((row["tries"] for row in rows), default=0)
    ks = sorted({2**i for i in range(most.bit_length())} | {most}) if most else []
    lines: dict[str, Points] = {}
    for k in ks:
        sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for row in rows:
            if row["tries"] >= k:
                sums[row["step"]][0] += pass_at(k, row["tries"], row["solved"]) * row["tasks"]
                sums[row["step"]][1] += row["tasks"]
        lines[f"pass@{k}"] = [(step, total / number) for step, (total, number) in sums.items()]
    note = "Chance that one of k attempts, drawn at random, solves a validation task; unbiased."
    return Chart("Learning", "pass@k", note, "% of tasks", ordered(lines))


def _cycles(connection: Any) -> list[Chart]:
    names = {
        "seconds/wait": ("waiting for play", "c0"),
        "seconds/prepare": ("preparing", "c5"),
        "seconds/train": ("training", "c1"),
        "seconds/evaluate": ("evaluation", "c3"),
        "seconds/save": ("checkpoints", "c2"),
        "seconds/other": ("the rest", "g0"),
    }
    layers: dict[str, Points] = {name: [] for name in names}
    for row in rows_of(connection, CYCLES, MAX_BARS, list(names)):
        layers[row["name"]].append((row["step"], row["seconds"]))
    series = [Series(*names[name], points) for name, points in layers.items() if points]
    note = (
        "What the trainer spent an iteration on. Where play runs ahead, it is only waited for. Preparing and the rest "
        "are known an iteration later, and shown there."
    )
    return [Chart("Time", "An iteration's time", note, "seconds an iteration", series, kind="stack")]
