"""The columns of the store, by their DuckDB types. ``docs/store.md`` shows the same table; a test compares them."""

from __future__ import annotations

from typing import NamedTuple

FORMAT = 1
"""Of the files and of ``run.json``; grows when a reader of today would misread the files of tomorrow."""

RUN_FILE = "run.json"
"""Beside the files: format, and which run this one went on from."""


class Column(NamedTuple):
    """One column: its type is DuckDB's."""

    name: str
    type: str
    meaning: str


TURNS = (
    Column("phase", "VARCHAR", "name of its file: `train-000003`, `evaluate-step000006` or `play`"),
    Column("stage", "VARCHAR", "`train`, `evaluate` or `play`"),
    Column("iteration", "INTEGER", "of training; null elsewhere"),
    Column("policy_version", "INTEGER", "`global_step` of the oldest weights that sampled any of it"),
    Column("versions", "STRUCT(policy_version INTEGER, num_tokens INTEGER)[]", "which weights sampled which tokens"),
    Column("task_id", "VARCHAR", "of the task"),
    Column("group_id", "INTEGER", "index of the task within the phase"),
    Column("sample", "INTEGER", "index of the attempt at the task"),
    Column("turn", "INTEGER", "0-based"),
    Column("num_turns", "INTEGER", "of its trajectory"),
    Column("prompt", "VARCHAR", "text of the first prompt; null in later turns, which go on with an observation"),
    Column("response", "VARCHAR", "as the environment read it"),
    Column("observation", "VARCHAR", "what the environment answered; empty after the last turn"),
    Column("prompt_ids", "INTEGER[]", "the full context, exactly as the engine saw it"),
    Column("response_ids", "INTEGER[]", "the sampled tokens"),
    Column("rollout_logprobs", "FLOAT[]", "of the sampled tokens under the weights that sampled them"),
    Column("rewards", "MAP(VARCHAR, DOUBLE)", "components of this turn's reward"),
    Column("reward", "DOUBLE", "their sum"),
    Column("return", "DOUBLE", "sum of the rewards from this turn on"),
    Column("advantage", "DOUBLE", "credit of the turn; null in evaluation"),
    Column("token_advantages", "FLOAT[]", "of the sampled tokens, where those of a turn differ"),
    Column("success", "BOOLEAN", "the trajectory solved its task"),
    Column("format_error", "BOOLEAN", "the response held no action that could be understood"),
    Column("finish_reason", "VARCHAR", "of the response: `stop` or `length`"),
    Column("stop_reason", "VARCHAR", "of the trajectory: `done`, `max_turns`, `context` or `failed`"),
    Column("failure", "VARCHAR", "why the trajectory failed; empty otherwise"),
    Column("sql", "VARCHAR", "the statement, where the environment gives one"),
    Column("status", "VARCHAR", "what came of it: `ok`, `error`, `denied`, `timeout` or `limit`"),
    Column("details", "VARCHAR", "all that the environment says for the store, as JSON"),
    Column("num_prompt_tokens", "INTEGER", "tokens of the prompt"),
    Column("num_response_tokens", "INTEGER", "tokens sampled"),
    Column("num_cached_tokens", "INTEGER", "tokens of the prompt that came out of the engine's prefix cache"),
    Column("engine_seconds", "DOUBLE", "from the request to the response, waiting included"),
    Column("environment_seconds", "DOUBLE", "inside the environment"),
    Column("temperature", "DOUBLE", "of the sampling"),
    Column("trained", "BOOLEAN", "it makes a training row"),
    Column("left_out", "VARCHAR", "why an iteration does not train it: `failed`, `uniform`, `flat` or `masked`"),
)
"""A row a turn, in the files of play. A trajectory that failed before its first turn has one row whose turn is null."""

TEXTS = ("prompt", "response", "observation", "failure", "sql", "details")
"""Columns of free text, of any length."""

LEARNT = (
    Column("iteration", "INTEGER", "of training"),
    Column("group_id", "INTEGER", "as in `turns`, as are the next two"),
    Column("sample", "INTEGER", ""),
    Column("turn", "INTEGER", ""),
    Column("pass_index", "INTEGER", "how often the turn was trained before"),
    Column("trained_at", "INTEGER", "`global_step` before the optimizer step"),
    Column("trainer_logprobs", "FLOAT[]", "of the sampled tokens under the trainer's weights before that step"),
    Column("logprob_gap", "FLOAT", "mean absolute difference of trainer and engine over the tokens, nats"),
    Column("logprob_gap_max", "FLOAT", "the largest"),
)
"""A row for each turn of an optimizer step, in a file of its own."""

KEY = ("iteration", "group_id", "sample", "turn")
"""What joins the two."""
