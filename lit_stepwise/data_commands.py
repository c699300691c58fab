"""The command ``lit-stepwise data``: what tasks need, and what is wrong with them, before a run finds out."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import Executor, TaskSource
from lit_stepwise.text2sql import SQLTask, Text2SQL
from lit_stepwise.text2sql.conversion.convert import convert, convert_tasks, target_of
from lit_stepwise.text2sql.datasets.databases import Need
from lit_stepwise.text2sql.datasets.tasks import SQLTaskSource
from lit_stepwise.text2sql.datasets.writer import write_tasks
from lit_stepwise.text2sql.executors import DuckDBExecutor, SQLiteExecutor
from lit_stepwise.text2sql.gold import GoldPolicy

COMMANDS = {
    "needs": "list the databases that tasks are about, and which of them are missing",
    "check": "run the gold statements, say which can be trained on, and write those",
    "convert": "turn SQLite databases, and the statements about them, into DuckDB",
}

USAGE = """usage: lit-stepwise data COMMAND FILE... [--source CLASS] [--source.key VALUE ...]

Looks after files of tasks and their databases.

commands:
{commands}

lit-stepwise data COMMAND --help lists every setting.
example: lit-stepwise data needs train.parquet --source SkyRLTasks --source.database_root data"""

_SEAMS: dict[str, type[Any]] = {"source": SQLTaskSource, "executor": Executor}


def run(words: Sequence[str]) -> int:
    """Run the command that is the first of ``words``; the exit code. Raises ``StepwiseError``."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())))
        return 0
    if words[0] not in COMMANDS:
        suggestion = _closest(words[:1], COMMANDS)
        print(f"error: unknown command 'data {words[0]}'{suggestion}; see lit-stepwise data --help", file=sys.stderr)
        return 2
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return {"needs": _needs, "check": _check, "convert": _convert}[words[0]](words[1:])


class Parser(ArgumentParser):
    """Says what is wrong in a line, with the closest right key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print it and leave with exit code 2."""
        if not self.exit_on_error:  # the parser of a class_path: jsonargparse wraps what it says
            super().error(message, ex)
        print(f"error: {self._explain(' '.join(message.split()))}", file=sys.stderr)
        sys.exit(2)

    def _explain(self, message: str) -> str:
        if (wrong := re.search(r'key "(\w+)": .* import path string: (\S+)$', message)) and wrong[1] in _SEAMS:
            ready = ", ".join(sorted(_classes(_SEAMS[wrong[1]])))
            return f"--{wrong[1]} {wrong[2]} is no class; use one of {ready}, or the class_path of your own"
        known = {action.dest for action in self._actions}
        known |= {key for base in _SEAMS.values() for each in _classes(base).values() for key in _settings(each)}
        named = re.findall(r"--[\w.]*?(\w+)(?=[\s=]|$)|(?:[Oo]ption|[Kk]ey) '([\w.]+)'", message)
        return f"{message}{_closest([first or second for first, second in named], known)}"


def _parser(command: str, files: str = "Files of tasks.") -> Parser:
    parser = Parser(prog=f"lit-stepwise data {command}", description=COMMANDS[command], allow_abbrev=False)
    parser.add_argument("files", nargs="+", metavar="FILE", help=files)
    default = {"class_path": "lit_stepwise.text2sql.datasets.tasks.JSONLTasks"}
    parser.add_subclass_arguments(TaskSource, "source", default=default, help="How files become tasks.")
    return parser


def _parse(parser: Parser, words: Sequence[str]) -> Namespace:
    """The settings with their objects made. Raises ``ConfigError`` for a source that knows no databases."""
    settings: Namespace = parser.instantiate(parser.parse_args(list(words)))
    if not isinstance(settings.source, SQLTaskSource):
        ready = ", ".join(sorted(_classes(SQLTaskSource)))
        raise ConfigError(f"--source {type(settings.source).__name__} says nothing of databases; use one of {ready}")
    settings.source.prepare()
    return settings


def _classes(base: type[Any]) -> dict[str, type[Any]]:
    """The classes that can stand for ``base``, by name."""
    below = [found for each in base.__subclasses__() for found in _classes(each).values()]
    return {each.__name__: each for each in (base, *below) if not inspect.isabstract(each)}


def _settings(kind: type[Any]) -> list[str]:
    return list(inspect.signature(kind).parameters)


def _closest(words: Iterable[str], known: Iterable[str]) -> str:
    close = [match for word in words for match in get_close_matches(word, list(known), n=1, cutoff=0.5)]
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


# ---- needs


def _needs(words: Sequence[str]) -> int:
    parser = _parser("needs")
    parser.add_argument("--names", action="store_true", help="Print only the missing ones: their paths below the root.")
    settings = _parse(parser, words)
    needs = _summed(need for file in settings.files for need in settings.source.needs(file))
    missing = [need for need in needs if need.path is None]
    if settings.names:
        print(*(f"{need.name}\n" for need in missing), sep="", end="")
        return 0
    sizes = [need.path.stat().st_size if need.path else 0 for need in needs]
    width = max((len(need.name) for need in needs), default=0)
    for need, size in zip(needs, sizes, strict=True):
        state = f"{size / 1e6:8.2f} MB" if need.path else "missing"
        print(f"{need.name:{width}}  {_counted(need.num_tasks, 'task'):>12}  {state}")
    there = f"{len(needs) - len(missing)} present ({sum(sizes) / 1e6:.1f} MB)"
    num_tasks = _counted(sum(need.num_tasks for need in needs), "task")
    print(f"{_counted(len(needs), 'database')} of {num_tasks}: {len(missing)} missing, {there}")
    return 0


def _summed(needs: Iterable[Need]) -> list[Need]:
    """One entry for each database, however many files have tasks about it."""
    counts: Counter[tuple[str, Any]] = Counter()
    for need in needs:
        counts[need.name, need.path] += need.num_tasks
    found = [Need(name, path, count) for (name, path), count in counts.items()]
    return sorted(found, key=lambda need: need.name)


# ---- check


def _check(words: Sequence[str]) -> int:
    parser = _parser("check")
    default = {"class_path": "lit_stepwise.text2sql.SQLiteExecutor"}
    parser.add_subclass_arguments(Executor, "executor", default=default, help="What runs the gold statements.")
    parser.add_class_arguments(GoldPolicy, "gold_policy")
    parser.add_argument("--write", metavar="FILE.jsonl", type=str, help="Write the tasks that pass, for JSONLTasks.")
    settings = _parse(parser, words)
    if settings.write in settings.files:
        raise ConfigError(f"--write {settings.write} would replace a file that is read; write to another")
    tasks = [task for file in settings.files for task in settings.source.read(file)]
    environment = Text2SQL(settings.executor, gold_policy=settings.gold_policy, schema="compact")
    with closing(environment):
        prepared = environment.prepare(tasks)
    if prepared.report:
        print(prepared.report)
    print(f"{len(prepared.tasks)} of {_counted(len(tasks), 'task')} can be trained on")
    if settings.write:
        kept = [task for task in prepared.tasks if isinstance(task, SQLTask)]
        root = _root(settings.source, settings.files, kept)
        write_tasks(kept, Path(settings.write), root)
        print(f"wrote {settings.write}, to be read by JSONLTasks with database_root: {root}")
    return 0


def _root(source: SQLTaskSource, files: Sequence[str], tasks: Sequence[SQLTask]) -> Path:
    """The folder that all databases lie below: the one they were found in, or else that of the files."""
    for root in (root for file in files for root in source.roots(Path(file))):
        if all(task.database.resolve().is_relative_to(root.resolve()) for task in tasks):
            return root
    if source.database_root is not None:
        return Path(source.database_root)
    return Path(os.path.commonpath([Path(file).resolve().parent for file in files]))


# ---- convert


def _convert(words: Sequence[str]) -> int:
    parser = _parser("convert", "Files of tasks, or SQLite files, or folders with some.")
    parser.add_argument(
        "--target",
        metavar="DIR",
        type=str,
        required=True,
        help="Where to write: tasks as DIR/<name of their file>.jsonl, databases below DIR/databases.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Convert databases that are there already, too.")
    parser.add_class_arguments(SQLiteExecutor, "sqlite")
    parser.add_class_arguments(DuckDBExecutor, "duckdb")
    settings = _parse(parser, words)
    files = [Path(file) for file in settings.files]
    databases = [file for file in files if _holds_databases(file)]
    target = Path(settings.target)
    tasks = _tasks_by_file([file for file in files if file not in databases], settings.source, target)
    databases += sorted({task.database for each in tasks.values() for task in each})
    conversions = convert(databases, target / "databases", settings.overwrite)
    print(*conversions, sep="\n")
    num_written = 0
    for file, each in tasks.items():
        ready = [task for task in each if target_of(task.database, target / "databases").is_file()]
        if len(ready) < len(each):
            print(f"{file}: {_counted(len(each) - len(ready), 'task')} left out with databases that failed")
        written = convert_tasks(ready, target / "databases", file, settings.sqlite, settings.duckdb)
        print(written)
        num_written += written.num_equal
    failed = all(conversion.status == "failed" for conversion in conversions)
    return int(failed or (bool(tasks) and not num_written))


def _holds_databases(path: Path) -> bool:
    """Whether this is a folder or a SQLite file, and no file of tasks."""
    if path.is_dir():
        return True
    with suppress(OSError), path.open("rb") as file:  # what cannot be read is left to the reader, which says why
        return file.read(16) == b"SQLite format 3\0"
    return False


def _tasks_by_file(files: Sequence[Path], source: SQLTaskSource, target: Path) -> dict[Path, list[SQLTask]]:
    """The tasks by the file that they are converted to."""
    tasks: dict[Path, list[SQLTask]] = {}
    for file in files:
        to = target / f"{file.stem}.jsonl"
        if to in tasks or (to.exists() and to.samefile(file)):
            raise ConfigError(f"--target {target}: {file} would be written over another as {to}; use another folder")
        tasks[to] = [task for task in source.read(str(file)) if isinstance(task, SQLTask)]
    return tasks


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
