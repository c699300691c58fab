"""Writes what was played and learnt: a whole file at a time, so that a crash never leaves half of one."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from lit_stepwise.store.schema import FORMAT, LEARNT, RUN_FILE, TEXTS, TURNS, Column
from lit_stepwise.store.settings import Storage
from lit_stepwise.types import MiniBatch, StepSample, Trajectory, Turn

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredPhase:
    """One phase of play, to be written."""

    stage: Literal["train", "evaluate", "play"]
    policy_version: int
    trajectories: Sequence[Trajectory]
    iteration: int | None = None
    """Only of training."""
    advantages: Sequence[Sequence[float]] | None = None
    """Of every trajectory those of its turns."""
    left_out: Sequence[str] | None = None
    """Of every trajectory why it is not trained; empty: it is. None: nothing is."""

    @property
    def name(self) -> str:
        """Of its file."""
        match self.stage:
            case "train":
                return f"train-{self.iteration:06d}"
            case "evaluate":
                return f"evaluate-step{self.policy_version:06d}"
            case "play":
                return "play"


@dataclass(frozen=True, slots=True)
class Lineage:
    """The run that this one goes on from, and where it left it."""

    folder: Path
    """Of its store."""
    iteration: int
    """The last one that it is followed in."""
    step: int
    """``global_step`` of the checkpoint."""


class TrajectoryStore:
    """Writes to ``folder``; every file is named ``.part`` until it is whole and on the disk.

    Args:
        folder: is made when there is something to write.
        settings: what of it is kept.
        decode: gives the text of token ids, for first prompts.
    """

    def __init__(
        self,
        folder: Path,
        settings: Storage = Storage(),  # noqa: B008  (frozen)
        decode: Callable[[Sequence[int]], str] = lambda ids: "",
    ) -> None:
        import pyarrow
        import pyarrow.parquet

        self.folder = folder
        self.settings = settings
        self.decode = decode
        self._seconds = 0.0
        self._arrow = pyarrow

    def take_seconds(self) -> float:
        """Time spent writing since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def begin(self, lineage: Lineage | None = None) -> None:
        """Say what the folder holds, and which run it goes on from."""
        source = os.path.relpath(lineage.folder.absolute(), self.folder.absolute()) if lineage else None
        said = {"format": FORMAT, "resumed_from": source}
        if lineage is not None:
            said |= {"iteration": lineage.iteration, "step": lineage.step}
        with self._whole(RUN_FILE) as file:
            file.write(json.dumps(said).encode())

    def write(self, phase: StoredPhase) -> Path:
        """Write the turns of a phase of play to ``<folder>/<phase.name>.parquet``."""
        with self._timed():
            path = self._write(phase.name, TURNS, list(self._rows(phase)))
            self._make_room()
        return path

    def learn(self, batch: MiniBatch, logprobs: Mapping[int, Sequence[float]], step: int) -> None:
        """Write what the trainer gave the tokens of an optimizer step.

        Args:
            batch: what was trained.
            logprobs: of the sampled tokens of its samples, by index.
            step: ``global_step`` before it.
        """
        with self._timed():
            rows = [row for i, values in sorted(logprobs.items()) for row in self._learnt(batch, i, values, step)]
            self._write(f"learnt-{batch.iteration:06d}-{step:06d}", LEARNT, rows)

    # ---- files

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    @contextmanager
    def _whole(self, name: str) -> Iterator[Any]:
        """A file that takes its name when all of it is on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{name}.part"
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / name)

    def _write(self, name: str, columns: tuple[Column, ...], rows: list[Row]) -> Path:
        if not (self.folder / RUN_FILE).exists():
            self.begin()
        table = self._arrow.Table.from_pylist(rows, _schema(self._arrow, columns))
        with self._whole(f"{name}.parquet") as file:
            self._arrow.parquet.write_table(table, file, **_encoding(self._arrow, table.schema))
        return self.folder / f"{name}.parquet"

    def _make_room(self) -> None:
        """Remove the oldest iterations of training, but never the newest."""
        if self.settings.max_gib is None:
            return
        sizes = {path: path.stat().st_size for path in self.folder.glob("*.parquet")}
        excess = sum(sizes.values()) - self.settings.max_gib * 2**30
        for path in sorted(self.folder.glob("train-*.parquet"))[:-1]:
            if excess <= 0:
                return
            learnt = self.folder.glob(path.name.replace("train-", "learnt-").replace(".parquet", "-*.parquet"))
            for each in (path, *learnt):
                each.unlink()
                excess -= sizes[each]

    # ---- rows

    def _rows(self, phase: StoredPhase) -> Iterator[Row]:
        texts: dict[tuple[int, ...], str] = {}
        for i, trajectory in enumerate(phase.trajectories):
            left_out = phase.left_out[i] if phase.left_out is not None else None
            common = {
                "phase": phase.name,
                "stage": phase.stage,
                "iteration": phase.iteration,
                "policy_version": phase.policy_version,
                "task_id": trajectory.task_id,
                "group_id": trajectory.group,
                "sample": trajectory.sample,
                "num_turns": len(trajectory.turns),
                "success": trajectory.success,
                "stop_reason": trajectory.stop_reason.value,
                "failure": trajectory.failure,
                "temperature": trajectory.temperature,
                "trained": left_out == "",
                "left_out": left_out or None,
            }
            if not trajectory.turns:
                yield common
                continue
            prompt_ids = tuple(trajectory.turns[0].prompt_ids)
            if prompt_ids not in texts:  # the attempts at a task share theirs
                texts[prompt_ids] = self.decode(prompt_ids)
            advantages = phase.advantages[i] if phase.advantages is not None else None
            for t, turn in enumerate(trajectory.turns):
                advantage = advantages[t] if advantages is not None else None
                credit = {"return": sum(each.reward for each in trajectory.turns[t:]), "advantage": advantage}
                prompt = self._cut(texts[prompt_ids]) if t == 0 else None
                yield common | self._turn(turn, advantage) | credit | {"turn": t, "prompt": prompt}

    def _turn(self, turn: Turn, advantage: float | None) -> Row:
        feedback, details = turn.feedback, turn.feedback.details
        row = {
            "policy_version": turn.policy_version,
            "versions": [asdict(span) for span in turn.versions],
            "response": self._cut(turn.text),
            "observation": self._cut(feedback.observation),
            "rewards": list(feedback.rewards.items()),
            "reward": turn.reward,
            "format_error": feedback.format_error,
            "finish_reason": turn.finish_reason,
            "sql": _text(details.get("sql")),
            "status": _text(details.get("status")),
            "details": json.dumps(dict(details), default=str),
            "num_prompt_tokens": len(turn.prompt_ids),
            "num_response_tokens": len(turn.response_ids),
            "num_cached_tokens": turn.num_cached_tokens,
            "engine_seconds": turn.engine_seconds,
            "environment_seconds": turn.environment_seconds,
        }
        if self.settings.token_ids:
            row |= {"prompt_ids": turn.prompt_ids, "response_ids": turn.response_ids}
        if self.settings.logprobs:
            row["rollout_logprobs"] = turn.rollout_logprobs
            if turn.token_rewards and advantage is not None:
                row["token_advantages"] = [advantage + reward for reward in turn.token_rewards]
        return row

    def _cut(self, text: str) -> str:
        return _text(text[: self.settings.max_text_chars]) or ""

    def _learnt(self, batch: MiniBatch, index: int, logprobs: Sequence[float], step: int) -> Iterator[Row]:
        sample, first = batch.samples[index], 0
        for turn, rollout in enumerate(_turns_of(sample), start=sample.turn):
            mine = logprobs[first : first + len(rollout)]
            first += len(rollout)
            gaps = [abs(a - b) for a, b in zip(mine, rollout, strict=True) if math.isfinite(a - b)]
            yield {
                "iteration": batch.iteration,
                "group_id": sample.group,
                "sample": sample.sample,
                "turn": turn,
                "pass_index": batch.pass_index,
                "trained_at": step,
                "trainer_logprobs": mine if self.settings.logprobs else None,
                "logprob_gap": sum(gaps) / len(gaps) if gaps else None,
                "logprob_gap_max": max(gaps, default=None),
            }


def unused(folder: Path) -> Path:
    """``folder``, or the first of ``folder-2``, ``folder-3``, … that does not exist."""
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _turns_of(sample: StepSample) -> list[list[float]]:
    """The engine's logprobs of each turn of a training row; what the environment said between two parts them."""
    pairs = zip(sample.response_mask, sample.rollout_logprobs, strict=True)
    return [[value for _, value in run] for sampled, run in groupby(pairs, key=lambda pair: pair[0]) if sampled]


def _text(value: object) -> str | None:
    """Lone surrogates, of which a response may be made, cannot be encoded."""
    return None if value is None else str(value).encode("utf-8", "replace").decode()


def _schema(arrow: Any, columns: tuple[Column, ...]) -> Any:
    """The columns as pyarrow names them."""
    types = {
        "VARCHAR": arrow.string(),
        "INTEGER": arrow.int32(),
        "DOUBLE": arrow.float64(),
        "FLOAT": arrow.float32(),
        "BOOLEAN": arrow.bool_(),
        "INTEGER[]": arrow.list_(arrow.int32()),
        "FLOAT[]": arrow.list_(arrow.float32()),
        "MAP(VARCHAR, DOUBLE)": arrow.map_(arrow.string(), arrow.float64()),
        "STRUCT(policy_version INTEGER, num_tokens INTEGER)[]": arrow.list_(
            arrow.struct([("policy_version", arrow.int32()), ("num_tokens", arrow.int32())])
        ),
    }
    return arrow.schema([(column.name, types[column.type]) for column in columns])


def _encoding(arrow: Any, schema: Any) -> dict[str, Any]:
    """How columns are written.

    A question about a text reads all of it, and LZ4 is read in half the time of zstd, which halves ids and logprobs
    once more. These have no dictionary: zstd finds a prompt within the next one only where ids stand as they are. And
    every question reads the statistics of every file, so they are kept where they may rule a file out.
    """
    values = [field.name for field in schema if not arrow.types.is_nested(field.type)]
    return {
        "compression": {leaf: "lz4" if leaf in TEXTS else "zstd" for field in schema for leaf in _leaves(arrow, field)},
        "use_dictionary": values,
        "write_statistics": [name for name in values if name not in TEXTS],
        "store_schema": False,  # Parquet's own says as much
    }


def _leaves(arrow: Any, field: Any) -> list[str]:
    """Paths of the columns that Parquet stores a field as."""
    if arrow.types.is_map(field.type):
        return [f"{field.name}.key_value.{part}" for part in ("key", "value")]
    if arrow.types.is_list(field.type):
        return [f"{field.name}.list.{leaf}" for leaf in _leaves(arrow, field.type.value_field.with_name("element"))]
    if arrow.types.is_struct(field.type):
        return [f"{field.name}.{leaf}" for child in field.type for leaf in _leaves(arrow, child)]
    return [field.name]
