"""SQLite databases and the tasks about them, converted to DuckDB."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from lit_stepwise.errors import ConfigError, DataError
from lit_stepwise.interfaces import Executor
from lit_stepwise.text2sql.catalog import open_catalog
from lit_stepwise.text2sql.conversion.sqlite_to_duckdb import copy_database, known_names, same_answer
from lit_stepwise.text2sql.conversion.transpile import to_duckdb
from lit_stepwise.text2sql.datasets.tasks import SQLTask
from lit_stepwise.text2sql.datasets.writer import write_tasks
from lit_stepwise.text2sql.executors import DuckDBExecutor, SQLiteExecutor

_SUFFIXES = (".sqlite", ".sqlite3", ".db")
_MAX_SAID = 10  # tasks named in a report


@dataclass(frozen=True, slots=True)
class Conversion:
    """What came of one database."""

    source: Path
    target: Path
    status: Literal["converted", "kept", "failed"]
    """``kept``: the target was there already and was left alone; ``failed``: the target is as it was before."""
    num_tables: int = 0
    num_rows: int = 0
    source_bytes: int = 0
    target_bytes: int = 0
    differences: Sequence[str] = ()
    """What is not as it was, or why it failed."""

    def __str__(self) -> str:
        said = f"{self.source} -> {self.target}: {self.status}"
        if self.status == "converted":
            sizes = " -> ".join(f"{size / 1e6:.2f}" for size in (self.source_bytes, self.target_bytes))
            said += f", {self.num_tables} tables, {self.num_rows} rows, {sizes} MB"
        return "\n  - ".join((said, *self.differences))


@dataclass(frozen=True, slots=True)
class TaskConversion:
    """What came of the tasks about converted databases."""

    file: Path
    num_equal: int
    """Written to ``file``: the gold statement has the same rows on both systems."""
    num_different: int
    num_failed: int
    reasons: Sequence[str]
    """Why a task is not there, one line each."""

    def __str__(self) -> str:
        num_tasks = self.num_equal + self.num_different + self.num_failed
        said = (
            f"{self.file}: {self.num_equal} of {num_tasks} tasks have the same answer on DuckDB and are written; "
            f"{self.num_different} have another one, {self.num_failed} have none"
        )
        more = len(self.reasons) - _MAX_SAID
        return "\n  - ".join((said, *self.reasons[:_MAX_SAID], *([f"and {more} more"] if more > 0 else [])))


def convert(databases: Sequence[Path], target: Path, overwrite: bool = False) -> list[Conversion]:
    """Write SQLite databases as ``<target>/<name>/<name>.duckdb`` and compare every value.

    A database that cannot be converted is reported, and the others are converted all the same.

    Args:
        databases: Files, and folders in which files named ``.sqlite``, ``.sqlite3`` or ``.db`` are looked for.
        target: The folder to write into.
        overwrite: Replace databases that are there already, instead of leaving them alone.

    Raises:
        ConfigError: A package is missing.
        DataError: There is nothing to convert, or two databases have the same name.
    """
    _check_packages()
    sources = _find(databases)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--target {target} is no folder and cannot be made one ({error.strerror})") from error
    return [
        _convert(source, target_of(source, target), overwrite)
        for source in tqdm(sources, "converting", unit="database", delay=2)
    ]


def convert_tasks(
    tasks: Sequence[SQLTask],
    target: Path,
    file: Path,
    sqlite: Executor | None = None,
    duckdb: Executor | None = None,
) -> TaskConversion:
    """Write the tasks whose gold statement, put into the words of DuckDB, has the same rows there as on SQLite.

    Args:
        tasks: About SQLite databases.
        target: The folder that ``convert`` wrote their databases into.
        file: Where to write the tasks, as JSON lines for ``JSONLTasks``.
        sqlite: What runs the gold statements as they are; closed in the end, as the other is.
        duckdb: What runs them as they are written.

    Raises:
        ConfigError: A package is missing.
        DataError: A database has not been converted, or two tasks have the same id.
    """
    _check_packages()
    missing = next((task for task in tasks if not target_of(task.database, target).is_file()), None)
    if missing is not None:
        raise DataError(f"{target_of(missing.database, target)} is not there; convert {missing.database} first")
    converted: list[SQLTask] = []
    reasons: list[str] = []
    num_different = 0
    with closing(sqlite or SQLiteExecutor()) as reference, closing(duckdb or DuckDBExecutor()) as executor:
        names = {database: _names(database) for database in {task.database for task in tasks}}
        for task in tqdm(tasks, "converting", unit="task", delay=2):
            database = target_of(task.database, target)
            try:
                gold = to_duckdb(task.gold_sql, names[task.database])
            except ValueError as error:
                reasons.append(f"{task.task_id}: {error}")
                continue
            here, there = reference.execute(task.database, task.gold_sql), executor.execute(database, gold)
            if bad := next((result for result in (here, there) if result.status != "ok" or result.truncated), None):
                reasons.append(f"{task.task_id}: {bad.error or 'its result is too long to be compared'}")
            elif same_answer(there, here):
                converted.append(replace(task, database=database, gold_sql=gold))
            else:
                reasons.append(f"{task.task_id}: another answer")
                num_different += 1
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tasks(converted, file, target)
    return TaskConversion(file, len(converted), num_different, len(reasons) - num_different, reasons)


def target_of(database: Path, target: Path) -> Path:
    """Where below ``target`` a database is converted to."""
    return target / database.stem / f"{database.stem}.duckdb"


def _check_packages() -> None:
    missing = [package for package in ("duckdb", "pyarrow", "sqlglot") if find_spec(package) is None]
    if missing:
        raise ConfigError(f"converting needs {' and '.join(missing)}; pip install 'lit-stepwise[data]'")


def _find(databases: Sequence[Path]) -> list[Path]:
    """The files, by name. Raises ``DataError``."""
    found: dict[str, Path] = {}
    for path in databases:
        if not path.exists():
            raise DataError(f"{path} is not there; name SQLite files or folders with some")
        files = sorted(_walk(path)) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{path} holds no SQLite file named {', '.join(_SUFFIXES)}")
        for file in files:
            other = found.setdefault(file.stem.lower(), file)
            if other.resolve() != file.resolve():
                raise DataError(f"{other} and {file} have the same name; convert them into folders of their own")
    return list(found.values())


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.suffix.lower() in _SUFFIXES and path.is_file():
            with path.open("rb") as file:
                if file.read(16) == b"SQLite format 3\0":
                    yield path


def _convert(source: Path, target: Path, overwrite: bool) -> Conversion:
    if target.exists() and not overwrite:
        return Conversion(source, target, "kept")
    for suffix in ("-wal", "-journal"):
        journal = source.with_name(source.name + suffix)
        if journal.exists() and journal.stat().st_size:
            way_out = f"it has an unfinished journal, {journal.name}; open it once with SQLite to complete it"
            return Conversion(source, target, "failed", differences=[way_out])
    scratch = Path(tempfile.mkdtemp(prefix=f".{source.stem}-", dir=target.parent.parent))
    try:
        copied = copy_database(source, scratch / "new", scratch / "staging")
        target.parent.mkdir(exist_ok=True)
        target.with_name(f"{target.name}.wal").unlink(missing_ok=True)  # of what is replaced
        os.replace(scratch / "new", target)
    except (DataError, OSError) as error:
        return Conversion(source, target, "failed", differences=[str(error)])
    finally:
        shutil.rmtree(scratch)
    sizes = source.stat().st_size, target.stat().st_size
    return Conversion(source, target, "converted", copied.num_tables, copied.num_rows, *sizes, copied.differences)


def _names(database: Path) -> set[str]:
    with open_catalog(database) as catalog:
        return known_names(catalog.tables())
