"""What was played, one JSON line per trajectory, one file per phase of play."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from lit_stepwise.types import Trajectory


@dataclass(frozen=True, slots=True)
class TrajectoryStore:
    """Writes whole files and renames them into place, so that a crash never leaves half of one.

    DuckDB reads them all at once: ``select * from read_json('runs/tiny/*/trajectories/train-*.jsonl')``.
    """

    folder: Path

    def write(
        self, name: str, trajectories: Sequence[Trajectory], advantages: Sequence[Sequence[float]] | None = None
    ) -> Path:
        """Write ``<folder>/<name>.jsonl``; ``advantages[i][t]`` belongs to turn t of trajectory i."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.jsonl"
        part = path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            for i, trajectory in enumerate(trajectories):
                record = _record(trajectory, advantages[i] if advantages else None)
                file.write(json.dumps(record, ensure_ascii=False, default=_plain) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        return path


def read_trajectories(path: Path) -> list[dict[str, Any]]:
    """The records of one file, in order."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _record(trajectory: Trajectory, advantages: Sequence[float] | None) -> dict[str, Any]:
    turns = [_fields(turn) | {"reward": turn.reward} for turn in trajectory.turns]
    if advantages is not None:
        for turn, advantage in zip(turns, advantages, strict=True):
            turn["advantage"] = advantage
    return _fields(trajectory) | {"turns": turns, "reward": trajectory.reward, "success": trajectory.success}


def _fields(value: Any) -> dict[str, Any]:
    """``asdict`` would copy every token id."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _plain(value: Any) -> Any:
    return _fields(value) if is_dataclass(value) else str(value)
