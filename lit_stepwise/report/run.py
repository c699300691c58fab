"""What a run is, for the head of its report: from its files, its configuration and its store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import yaml

from lit_stepwise.store.find import StoredRun
from lit_stepwise.store.read import rows_of

COUNTS = """
select count(*) filter (stage = 'train') as played, count(distinct iteration) filter (stage = 'train') as iterations,
    count(*) filter (stage = 'evaluate') as evaluated, count(*) filter (stage = 'play') as loose, count(*) as all,
    sum(num_turns)::bigint as turns, sum(num_response_tokens)::bigint as tokens
from attempts
"""

SOLVED = """
select stage, min(policy_version) as step, avg(success::int) as solved from attempts
where stop_reason <> 'failed' and (stage = 'train' or greedy) group by stage, phase order by stage, phase
"""

UNTOLD = ("engine",)
"""Of ``rollout``: says where servers are, and a report is passed on."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A number that a reader looks for first."""

    name: str
    value: str
    note: str = ""


def name_of(run: StoredRun) -> str:
    """The end of its path; where it lies on this machine is nobody else's business."""
    return "/".join(run.folder.resolve().parts[-2:])


def config_of(run: StoredRun) -> Mapping[str, Any]:
    """Its ``config.yaml``; nothing where it has none that can be read."""
    path = run.folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def told(config: Mapping[str, Any]) -> str:
    """The configuration as YAML, without the machine and without what a report should not give away."""
    shown = {name: config[name] for name in ("seed_everything", "model", "data", "rollout") if name in config}
    if isinstance(shown.get("rollout"), dict):
        shown["rollout"] = {name: value for name, value in shown["rollout"].items() if name not in UNTOLD}
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True) if shown else ""


def facts(run: StoredRun, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what it was made with, as far as it is known."""
    model, data, rollout = (section(config, name) for name in ("model", "data", "rollout"))
    written = [path.stat().st_mtime for _, path in run.files("play")]
    known = {
        "model": model.get("model_path"),
        "tasks": data.get("train_files"),
        "environment": _class(rollout.get("environment"), with_settings=False),
        "credit": _class(rollout.get("advantage")),
        "loss": _class(model.get("loss")),
        "attempts at a task": rollout.get("samples_per_task"),
        "seed": config.get("seed_everything"),
        "written": _span(min(written), max(written)),
        "goes on from": ", ".join(part.name for part in run.parts[1:]),
        "not there": run.missing,
        "files that are not whole": ", ".join(path.name for path in run.broken),
    }
    return [(name, str(value)) for name, value in known.items() if value not in (None, "", [])]


def tiles(connection: Any) -> list[Tile]:
    """What it gained, and how much was played. ``connection`` has the table ``attempts``."""
    solved: dict[str, list[tuple[int, float]]] = {"evaluate": [], "train": [], "play": []}
    for row in rows_of(connection, SOLVED):
        solved[row["stage"]].append((row["step"], row["solved"]))
    (counts,) = rows_of(connection, COUNTS)
    gains = [_gain(name, solved[stage]) for name, stage in _STAGES.items() if solved[stage]]
    amounts = (
        Tile("Iterations", f"{counts['iterations']:,}", f"up to optimizer step {max(_last_steps(solved)):,}"),
        Tile(
            "Trajectories",
            f"{counts['all']:,}",
            f"{counts['played']:,} of training, {counts['evaluated']:,} of evaluation",
        ),
        Tile("Turns", f"{counts['turns']:,}", f"{counts['tokens']:,} sampled tokens"),
    )
    return [*gains, *(tile for tile in amounts if tile.value != "0")]


_STAGES = {"Validation accuracy": "evaluate", "Rollout accuracy": "train", "Accuracy of play": "play"}


def _gain(name: str, solved: list[tuple[int, float]]) -> Tile:
    (first, before), (_, after) = solved[0], solved[-1]
    if len(solved) == 1:
        return Tile(name, _percent(before), f"at step {first}")
    best, most = max(solved, key=lambda each: each[1])
    note = f"{_percent(before)} at step {first}; best {_percent(most)} at step {best}"
    return Tile(name, _percent(after), f"{(after - before) * 100:+.1f} points: {note}")


def _percent(share: float) -> str:
    return f"{share * 100:.1f}\u00a0%"


def _last_steps(solved: Mapping[str, list[tuple[int, float]]]) -> list[int]:
    return [each[-1][0] for each in solved.values() if each] or [0]


def _span(first: float, last: float) -> str:
    """From when to when, in UTC."""
    began, ended = (datetime.fromtimestamp(each, UTC) for each in (first, last))
    until = f"{ended:%H:%M}" if began.date() == ended.date() else f"{ended:%Y-%m-%d %H:%M}"
    return f"{began:%Y-%m-%d %H:%M} to {until} UTC"


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Of a configuration; empty where it has none."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _class(value: Any, with_settings: bool = True) -> str | None:
    """``DualClip(low=0.2)`` of a class_path and its arguments."""
    if not isinstance(value, dict) or "class_path" not in value:
        return value if isinstance(value, str) else None
    name = str(value["class_path"]).rpartition(".")[2]
    if not with_settings:
        return name
    scalars = {k: v for k, v in (value.get("init_args") or {}).items() if isinstance(v, int | float | bool)}
    return f"{name}({', '.join(f'{k}={v}' for k, v in scalars.items())})"
