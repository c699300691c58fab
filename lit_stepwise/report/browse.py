"""Trajectories as the page shows them: texts, tokens and numbers, as small as they can be said."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from math import isfinite
from typing import Any

from lit_stepwise.report.choose import Key
from lit_stepwise.report.pieces import Pieces
from lit_stepwise.store.read import rows_of

MAX_CHARS = 20_000
"""Of one text; the page says how much of it is left out."""
MAX_TOKENS = 4_096
"""Of one response that are coloured."""
AT_ONCE = 128
"""Trajectories read at a time: each time the files of their phases are gone through."""

CHOSEN = "create or replace temp table chosen (place integer, phase varchar, group_id integer, sample integer)"
HEADS = "select place, attempts.* from attempts join chosen using (phase, group_id, sample) order by place"
TURNS = """
select place, turns.* exclude (prompt_ids, versions) from turns join chosen using (phase, group_id, sample)
where phase in (select unnest(?::varchar[])) order by place, turn
"""


@dataclass(slots=True)
class Album:
    """Packed trajectories of all runs, with the texts that they share."""

    pieces: Pieces = field(default_factory=Pieces)
    """Texts of tokens."""
    prompts: Pieces = field(default_factory=Pieces)
    """First prompts."""
    trajectories: list[dict[str, Any]] = field(default_factory=list)

    def add(self, connection: Any, run: int, keys: Iterable[Key], tokenizer: Any, max_bytes: int) -> None:
        """Pack those of one run, in their order, until their JSON has grown by ``max_bytes``; one at least."""
        before, size = self._shared_bytes, 0
        for head, turns in _read(connection, keys):
            packed = _pack_head(head) | {"run": run, "prompt": None, "turns": []}
            if turns and (prompt := _cut(turns[0]["prompt"])) is not None:
                packed["prompt"] = self.prompts.add(prompt)
            packed["turns"] = [self._pack_turn(turn, tokenizer) for turn in turns]
            size += len(json.dumps(packed, separators=(",", ":")))
            if self.trajectories and size + self._shared_bytes - before > max_bytes:
                return
            self.trajectories.append(packed)

    @property
    def _shared_bytes(self) -> int:
        return self.pieces.num_bytes + self.prompts.num_bytes

    def _pack_turn(self, turn: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        packed = {
            "response": _cut(turn["response"]),
            "observation": _cut(turn["observation"]),
            "sql": _cut(turn["sql"]),
            "status": turn["status"],
            "details": _details(turn["details"]),
            "rewards": {name: _round(value) for name, value in (turn["rewards"] or {}).items()},
            "reward": _round(turn["reward"]),
            "return": _round(turn["return"]),
            "advantage": _round(turn["advantage"]),
            "format_error": turn["format_error"],
            "finish": turn["finish_reason"],
            "tokens": turn["num_response_tokens"],
            "prompt_tokens": turn["num_prompt_tokens"],
            "seconds": [_round(turn["engine_seconds"]), _round(turn["environment_seconds"])],
            "gap": _round(turn["logprob_gap"], "3g"),
            "gap_max": _round(turn["logprob_gap_max"], "3g"),
        }
        # nothing else is said by what is null, and thousands of turns add up
        return {name: value for name, value in packed.items() if value is not None} | self._pack_tokens(turn, tokenizer)

    def _pack_tokens(self, turn: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        """[R] What is known of each token; nothing where their texts are not known."""
        if tokenizer is None or turn["response_ids"] is None:
            return {}
        rollout, trainer = turn["rollout_logprobs"], turn["trainer_logprobs"]
        packed = {
            "pieces": self.pieces.of(tokenizer, turn["response_ids"][:MAX_TOKENS]),
            "logprobs": [_round(value, "3f") for value in (rollout or ())[:MAX_TOKENS]],
            "advantages": [_round(value) for value in (turn["token_advantages"] or ())[:MAX_TOKENS]],
        }
        if rollout and trainer and len(rollout) == len(trainer):
            pairs = zip(rollout[:MAX_TOKENS], trainer, strict=False)
            packed["drifts"] = [_round(one - other, "2g") for one, other in pairs]
        return {name: values for name, values in packed.items() if values}


def _read(connection: Any, keys: Iterable[Key]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(trajectory, its turns) by key, in their order."""
    remaining = iter(keys)
    while some := list(islice(remaining, AT_ONCE)):
        connection.execute(CHOSEN)
        connection.executemany("insert into chosen values (?, ?, ?, ?)", [(i, *key) for i, key in enumerate(some)])
        turns = defaultdict(list)
        for row in rows_of(connection, TURNS, sorted({phase for phase, _, _ in some})):
            turns[row["place"]].append(row)
        for head in rows_of(connection, HEADS):
            yield head, turns[head["place"]]


def _pack_head(head: dict[str, Any]) -> dict[str, Any]:
    return {
        "phase": head["phase"],
        "stage": head["stage"],
        "iteration": head["iteration"],
        "step": head["policy_version"],
        "task": head["task_id"],
        "group": head["group_id"],
        "sample": head["sample"],
        "num_turns": head["num_turns"],
        "success": head["success"],
        "reward": _round(head["reward"]),
        "advantage": _extreme(head["min_advantage"], head["max_advantage"]),
        "tokens": head["num_response_tokens"],
        "stop": head["stop_reason"],
        "failure": _cut(head["failure"] or ""),
        "temperature": head["temperature"],
        "left_out": head["left_out"],
    }


def _extreme(low: float | None, high: float | None) -> float | None:
    """Whichever is further from 0."""
    return None if low is None or high is None else _round(max(low, high, key=abs))


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= MAX_CHARS:
        return text
    return f"{text[:MAX_CHARS]}\n[the report leaves out {len(text) - MAX_CHARS:,} more characters]"


def _details(said: str | None) -> dict[str, str]:
    """What the environment noted besides the statement and its status."""
    found = json.loads(said) if said else {}
    if not isinstance(found, dict):
        return {}
    shown = {name: value for name, value in found.items() if name not in ("sql", "status") and value not in ("", None)}
    return {
        str(name): str(_cut(value if isinstance(value, str) else json.dumps(value))) for name, value in shown.items()
    }


def _round(value: float | None, style: str = "4g") -> float | int | None:
    """As few digits as one looks at; what is not finite JSON cannot say."""
    if value is None or not isfinite(value):
        return None
    rounded = float(f"{value:.{style}}")
    return int(rounded) if rounded == int(rounded) else rounded
