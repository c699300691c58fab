"""Which trajectories a report shows, when it cannot show all: what comes first is kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any

Key = tuple[str, int, int]
"""(phase, group, attempt)."""

EVALUATED = """
select phase, group_id, sample from attempts
where stage = 'evaluate' and (policy_version = ? or (policy_version = ? and task_id in (select unnest(?::varchar[]))))
order by not greedy, policy_version <> ?, task_id not in (select unnest(?::varchar[])), group_id, sample limit ?
"""
"""The last evaluation, its greedy attempts first, and of the first one the tasks that changed."""

PLAYED = """
with ranked as (
    select phase, group_id, sample, iteration,
        least(
            row_number() over (partition by phase order by reward desc, chance),
            row_number() over (partition by phase order by reward, chance),
            row_number() over (partition by phase order by chance)
        ) as place
    from (select *, md5(concat_ws('-', group_id, sample)) as chance from attempts where stage <> 'evaluate')
)
select phase, group_id, sample from ranked, (select min(iteration) as first, max(iteration) as last from ranked)
order by place, (iteration is not null and iteration not in (first, last)), hash(phase), group_id, sample limit ?
"""
"""The best, the worst and one at random of every iteration, then the second of each; where not all of these fit, of the
first, the last, and some iterations between."""


def choose(connection: Any, changed: dict[str, Any], most: int) -> list[Key]:
    """At most ``most`` trajectories, those to keep first, in turn of the last evaluation and of training.

    Args:
        connection: with the table ``attempts``.
        changed: what ``tasks_changed`` said.
        most: of them all.
    """
    steps: Sequence[int] = changed["steps"] or [-1]
    tasks = [row["task"] for row in changed["rows"]]
    asked = (steps[-1], steps[0], tasks, steps[-1], tasks, most)
    evaluated = connection.execute(EVALUATED, asked).fetchall()
    played = connection.execute(PLAYED, (most,)).fetchall()
    both = chain.from_iterable(zip_longest(evaluated, played))
    return [key for key in both if key is not None][:most]
