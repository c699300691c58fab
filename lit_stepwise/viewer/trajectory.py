"""One trajectory, turn by turn."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_stepwise.errors import ConfigError, StoreError
from lit_stepwise.viewer.questions import ask
from lit_stepwise.viewer.screen import number, safe

_NAME = re.compile(r"(?P<phase>[\w-]+)/(?P<group>\d+)/(?P<sample>\d+)")


def show_trajectory(console: Console, connection: Any, name: str, where: str, parameters: list[Any]) -> None:
    """The trajectory of that name (phase/group/sample), or the newest of the task of that name.

    ``where`` narrows the latter down. Raises ``StoreError`` when there is none.
    """
    found, number_of_others = _find(connection, name, where, parameters)
    key = (found["phase"], found["group_id"], found["sample"])
    console.print(Text(safe(_title(found, key)), style="bold"))
    if number_of_others:
        others = f"task {found['task_id']} has {number_of_others} more trajectories; see --task, or name one"
        console.print(Text(safe(others), style="dim"))
    query = "select * from turns where phase = ? and group_id = ? and sample = ? order by turn"
    turns = _rows(connection, query, *key)
    most = max((turn["reward"] for turn in turns), default=0.0)
    for turn in turns:
        earned_most = len(turns) > 1 and turn["reward"] == most and most > 0
        title = f"turn {turn['turn']}{', which earned the most' if earned_most else ''}"
        console.rule(title, align="left")
        console.print(_turn(turn))


def _find(connection: Any, name: str, where: str, parameters: list[Any]) -> tuple[dict[str, Any], int]:
    """The trajectory, and how many others the task has."""
    if match := _NAME.fullmatch(name):
        if where != "true":
            raise ConfigError(f"--trajectory {name} names one trajectory; leave out the filters, or name a task")
        query = "select * from trajectories where phase = ? and group_id = ? and sample = ?"
        if found := _rows(connection, query, match["phase"], int(match["group"]), int(match["sample"])):
            return found[0], 0
    query = f"select * from trajectories where task_id = ? and {where} order by policy_version desc, phase desc, sample"
    found = _rows(connection, query, name, *parameters)
    if not found:
        raise StoreError(f"there is no trajectory {name!r}, and none of a task of that name; --groups lists the tasks")
    return found[0], len(found) - 1


def _rows(connection: Any, query: str, *parameters: Any) -> list[dict[str, Any]]:
    names, rows = ask(connection, query, *parameters)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _title(found: dict[str, Any], key: tuple[str, int, int]) -> str:
    ended = f"failed: {found['failure']}" if found["failure"] else f"ended by {found['stop_reason']}"
    trained = "trained" if found["trained"] else f"left out: {found['left_out']}" if found["left_out"] else ""
    parts = [
        f"{key[0]}/{key[1]}/{key[2]}", f"task {found['task_id']}", "solved" if found["success"] else "not solved",
        f"reward {number(found['reward'])}", f"{found['num_turns']} turns", ended, trained,
        f"temperature {number(found['temperature'])}",
    ]  # fmt: skip
    return ", ".join(filter(None, parts))


def _turn(turn: dict[str, Any]) -> Table:
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name in ("prompt", "response", "sql", "status", "observation"):
        if turn[name]:
            grid.add_row(name, Text(safe(turn[name])))
    rewards = ", ".join(f"{name} {number(value)}" for name, value in (turn["rewards"] or {}).items())
    grid.add_row("reward", Text(safe(f"{number(turn['reward'])} ({rewards}); {number(turn['return'])} from here on")))
    if turn["advantage"] is not None:
        grid.add_row("advantage", Text(number(turn["advantage"])))
    if turn["logprob_gap"] is not None:
        grid.add_row("drift", Text(_drift(turn)))
    grid.add_row("tokens", Text(_tokens(turn)))
    return grid


def _drift(turn: dict[str, Any]) -> str:
    """How far engine and trainer are apart."""
    mean, largest = number(turn["logprob_gap"]), number(turn["logprob_gap_max"])
    said = f"engine and trainer differ by {mean} nats in the mean, {largest} at most"
    ours, theirs = turn["trainer_logprobs"], turn["rollout_logprobs"]
    if not ours or not theirs:
        return said
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    place = gaps.index(max(gaps))
    token = f" (id {turn['response_ids'][place]})" if turn["response_ids"] else ""
    where = f"at token {place + 1} of {len(gaps)}{token}"
    return f"{said}, {where}: engine {number(theirs[place])}, trainer {number(ours[place])}"


def _tokens(turn: dict[str, Any]) -> str:
    seconds = f"{number(turn['engine_seconds'])} s engine, {number(turn['environment_seconds'])} s environment"
    return (
        f"{turn['num_prompt_tokens']} read ({turn['num_cached_tokens']} from the cache), {turn['num_response_tokens']} "
        f"sampled by weights of step {turn['policy_version']}, {turn['finish_reason']}; {seconds}"
    )
