"""The commands ``show`` and ``compare``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lit_stepwise.errors import ConfigError
from lit_stepwise.store.find import find_run
from lit_stepwise.store.read import open_run
from lit_stepwise.viewer.compare import show_comparison
from lit_stepwise.viewer.overview import notes, show_overview
from lit_stepwise.viewer.questions import ask
from lit_stepwise.viewer.screen import safe, screen, write
from lit_stepwise.viewer.trajectory import show_trajectory

_LINES = 20
"""Of a table, where --limit does not say."""

TURNS = """select phase || '/' || group_id || '/' || sample as trajectory, turn, task_id as task, reward,
advantage, logprob_gap_max as gap, status, response from turns"""
GROUPS = """select phase, group_id, task_id as task, attempts, solved, reward, num_turns as turns, trained, kind
from groups"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {safe(message)}; see {self.prog} --help\n")
        sys.exit(2)


def run(words: Sequence[str]) -> int:
    """Look at a run, or at two; the exit code."""
    try:
        _COMMANDS[words[0]](PARSERS[words[0]]().parse_args(list(words[1:])))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} shows nothing; use 1 or more")
    return int(word)


def _parser(command: str, text: str) -> _Parser:
    return _Parser(prog=f"lit-stepwise {command}", description=text, allow_abbrev=False)


def _show_parser() -> _Parser:
    parser = _parser("show", "What a run played and learnt. Without an option: an overview. With a filter: its turns.")
    parser.add_argument("run", metavar="RUN", help="runs/tiny/version_0; or runs/tiny, of which the newest run counts")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--groups", action="store_true", help="the groups: too easy, mixed, too hard")
    what.add_argument("--trajectory", metavar="NAME", help="turn by turn: train-000003/0/5, or a task's newest")
    what.add_argument("--sql", metavar="SELECT", help="any query of the views in docs/store.md")
    parser.add_argument("--iteration", type=int, metavar="N", help="only of this iteration")
    parser.add_argument("--stage", choices=("train", "evaluate", "play"), help="only of this kind of play")
    parser.add_argument("--task", metavar="TASK", help="only of this task")
    parser.add_argument("--where", metavar="SQL", help="only what fulfils it: 'advantage > 1 and not success'")
    parser.add_argument("--sort", metavar="SQL", help="in this order: 'advantage desc'")
    parser.add_argument("--limit", type=_count, metavar="N", help=f"lines at most; of a table {_LINES} unless given")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table")
    return parser


def _show(options: argparse.Namespace) -> None:
    found = find_run(options.run)
    where, parameters = _filters(options)
    is_list = bool(options.groups or options.sql or options.sort or where != "true") and not options.trajectory
    connection = open_run(found, many_questions=not is_list and not options.trajectory)
    if options.format != "table" and not is_list:
        raise ConfigError(f"--format {options.format} is for rows; give --sql, --groups or a filter, say --stage train")
    if not is_list and not options.trajectory:
        show_overview(screen(), found, connection)
        return
    print(*(f"note: {safe(note)}\n" for note in notes(found)), sep="", end="", file=sys.stderr)
    if options.trajectory:
        show_trajectory(screen(), connection, options.trajectory, where, parameters)
    else:
        _list(connection, options, where, parameters)


def _filters(options: argparse.Namespace) -> tuple[str, list[Any]]:
    """What the options ask for, as SQL with its parameters."""
    for name in ("trajectory", "sql", "task", "where", "sort"):
        if getattr(options, name) is not None and not getattr(options, name).strip():
            raise ConfigError(f"--{name} is empty; give what it names, or leave it out")
    given = {"iteration": options.iteration, "stage": options.stage, "task_id": options.task}
    wanted = {name: value for name, value in given.items() if value is not None}
    if options.sql and (wanted or options.where or options.sort):
        raise ConfigError("--sql asks for all that it wants itself; leave out the filters and --sort")
    conditions = [f"{name} = ?" for name in wanted]
    conditions += [f"({options.where}\n)"] if options.where else []
    return " and ".join(conditions) or "true", list(wanted.values())


def _list(connection: Any, options: argparse.Namespace, where: str, parameters: list[Any]) -> None:
    limit = options.limit or (_LINES if options.format == "table" else None)
    if options.sql:
        query = options.sql
    else:
        base, order = (GROUPS, "phase desc, group_id") if options.groups else (TURNS, "phase, group_id, sample, turn")
        end = f"order by {options.sort or order}" + (f"\nlimit {limit + 1}" if limit is not None else "")
        if limit is not None and not options.groups:
            # in which few phases they are, so that no text of all others is read: that takes half the time
            asked = f"select distinct phase from (select phase, {TURNS.removeprefix('select')} where {where} {end})"
            phases = [phase for (phase,) in ask(connection, asked, *parameters)[1]]
            where, parameters = f"list_contains(?, phase) and {where}", [phases, *parameters]
        query = f"{base} where {where} {end}"
    names, rows = ask(connection, query, *parameters)
    write(names, rows[:limit], options.format)
    if limit is not None and len(rows) > limit and options.format == "table":
        print(f"... and more; --limit shows how many you like (these are {limit})")


def _compare_parser() -> _Parser:
    parser = _parser("compare", "Two runs side by side: curves, lengths, tasks that got better or worse, settings.")
    parser.add_argument("runs", metavar="RUN", nargs=2, help="a folder such as runs/tiny/version_0")
    parser.add_argument("--limit", type=_count, default=5, metavar="N", help="tasks shown of each kind")
    return parser


def _compare(options: argparse.Namespace) -> None:
    runs = find_run(options.runs[0]), find_run(options.runs[1])
    for each in runs:
        print(*(f"note: {safe(note)}\n" for note in notes(each)), sep="", end="", file=sys.stderr)
    connections = open_run(runs[0], many_questions=True), open_run(runs[1], many_questions=True)
    show_comparison(screen(), runs, connections, options.limit)


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {"show": _show_parser, "compare": _compare_parser}
"""Of each command's words."""

_COMMANDS = {"show": _show, "compare": _compare}
