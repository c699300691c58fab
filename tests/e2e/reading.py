"""What a run has left in its folder."""

from __future__ import annotations

import csv
from pathlib import Path

from lit_stepwise.store.read import open_run


def metrics(folder: Path) -> dict[str, dict[str, float]]:
    """By step."""
    steps: dict[str, dict[str, float]] = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            steps.setdefault(row["step"], {}).update({name: float(value) for name, value in row.items() if value})
    return steps


def played(folder: Path) -> list[tuple[str, list[int], list[int]]]:
    """What the engine read and wrote in all of the run."""
    return sorted(open_run(folder).execute("select phase, prompt_ids, response_ids from turns").fetchall())


def differing(one: Path, other: Path) -> dict[str, tuple[float, float]]:
    """By step and name: what differs of all that has to be equal on however many ranks; at least a number is there."""
    expected, found = metrics(one), metrics(other)
    assert list(found) == list(expected)
    numbers = {
        f"{step} {name}": (value, found[step][name])
        for step, values in expected.items()
        for name, value in values.items()
        # each rank has a tree of its own, and a clock
        if name.split("/")[0] in ("train", "rollout", "val") or name in ("tokens/trained", "tokens/generated")
    }
    assert numbers
    return {name: (a, b) for name, (a, b) in numbers.items() if abs(a - b) > max(1e-4, 1e-3 * abs(a))}
