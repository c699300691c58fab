"""Tasks of text-to-SQL and the databases they are about."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_stepwise.errors import DataError
from lit_stepwise.interfaces import TaskSource
from lit_stepwise.types import Task

SchemaStyle = Literal["compact", "ddl"]

_REQUIRED = ("id", "db_id", "question", "gold_sql")
_OPTIONAL: dict[str, type] = {"evidence": str, "split": str, "num_lookups": int}
_RESERVED = (
    " ADD ALL ALTER AND AS BETWEEN CASE CHECK COLUMN COMMIT CONSTRAINT CREATE DEFAULT DELETE DISTINCT DROP ELSE EXISTS "
    "FOR FOREIGN FROM GROUP HAVING IN INDEX INSERT INTO IS JOIN LIMIT NOT NULL ON OR ORDER PRIMARY REFERENCES SELECT "
    "SET TABLE THEN TO TRANSACTION UNION UNIQUE UPDATE USING VALUES WHEN WHERE "
)
_TABLES_OF_SQLITE = (
    "SELECT name, sql FROM sqlite_master WHERE type IN ('table', 'view') AND substr(name, 1, 7) <> 'sqlite_'"
)
_TABLES_OF_DUCKDB = "SELECT sql FROM duckdb_tables() UNION ALL SELECT sql FROM duckdb_views() WHERE NOT internal"
_COLUMNS_OF_DUCKDB = (
    "SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal ORDER BY table_oid, column_index"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SQLTask(Task):
    """A question about a database."""

    question: str
    database: Path
    gold_sql: str
    """A statement whose result is right."""
    evidence: str = ""
    """What one has to know beyond the database to understand the question."""
    num_lookups: int | None = None
    """How many stored values have to be looked up first, where that is known: the grade of difficulty."""


@dataclass
class JSONLTasks(TaskSource):
    """Files with one task per line, a JSON object with ``id, db_id, question, gold_sql`` and maybe ``evidence, split``.

    Databases are ``<root>/<db_id>/<db_id>.sqlite`` or ``<root>/<db_id>.sqlite`` (or ``.duckdb``).
    """

    database_root: str | None = None
    """Folder of the databases; by default the folder ``databases`` beside the file of tasks."""
    split: str | None = None
    """Only the lines whose ``split`` is this; by default all."""

    def read(self, file: str) -> list[Task]:
        """All tasks of ``file``, in order. Raises ``DataError`` with file and line for what cannot be read."""
        path = Path(file)
        root = Path(self.database_root) if self.database_root is not None else path.parent / "databases"
        tasks: list[Task] = []
        lines: dict[str, int] = {}
        missing: Counter[str] = Counter()
        for number, record in _records(path):
            where = f"{file}, line {number}"
            _check_fields(record, where)
            if (first := lines.setdefault(record["id"], number)) != number:
                raise DataError(f"{where}: the id {record['id']!r} is taken by line {first}; ids have to be unique")
            if self.split is not None and record.get("split") != self.split:
                continue
            database = _find_database(root, record["db_id"], where)
            if database is None:
                missing[record["db_id"]] += 1
            else:
                tasks.append(_task(record, database))
        if missing:
            raise DataError(_say_missing(file, root, missing))
        if not tasks:
            way_out = f"write a JSON object with {', '.join(_REQUIRED)} on each line"
            if self.split is not None:
                way_out = f"data.source.split={self.split!r} keeps none of its lines"
            raise DataError(f"{file} holds no task; {way_out}")
        return tasks


def read_schema(database: Path, style: SchemaStyle) -> str:
    """The tables and views of a database for a prompt: ``orders(id, status)`` a line, or the statements that made them.

    Raises ``DataError`` when it cannot be read.
    """
    try:
        with database.open("rb") as file:
            is_sqlite = file.read(16) in (b"SQLite format 3\0", b"")
        return _sqlite_schema(database, style) if is_sqlite else _duckdb_schema(database, style)
    except (OSError, sqlite3.Error) as error:
        raise DataError(f"{database}: the tables cannot be read ({error}); is it a SQLite database?") from error


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their 1-based line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check data.*_files") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number} is no JSON object but {type(record).__name__}")
        yield number, record


def _check_fields(record: dict[str, Any], where: str) -> None:
    for name in _REQUIRED:
        if name not in record:
            raise DataError(f"{where}: the field {name!r} is missing; a task needs {', '.join(_REQUIRED)}")
        if not isinstance(record[name], str) or not record[name].strip():
            raise DataError(f"{where}: {name} is {record[name]!r}; it has to be text that is not empty")
    for name, kind in _OPTIONAL.items():
        value = record.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise DataError(f"{where}: {name} is {value!r}; it has to be {'text' if kind is str else 'a whole number'}")


def _task(record: dict[str, Any], database: Path) -> SQLTask:
    return SQLTask(
        task_id=record["id"],
        question=record["question"],
        database=database,
        gold_sql=record["gold_sql"],
        evidence=record.get("evidence") or "",
        num_lookups=record.get("num_lookups"),
    )


def _find_database(root: Path, db_id: str, where: str) -> Path | None:
    """The file of a database, None when there is none. Raises ``DataError`` for a name that leads out of ``root``."""
    root = root.resolve()
    for name in (f"{db_id}/{db_id}", db_id):
        for suffix in (".sqlite", ".duckdb"):
            try:
                path = (root / f"{name}{suffix}").resolve()
            except (ValueError, OSError) as error:
                raise DataError(f"{where}: db_id {db_id!r} is no name of a file ({error})") from error
            if not path.is_relative_to(root):
                raise DataError(f"{where}: db_id {db_id!r} leads out of the folder of databases {root}")
            if path.is_file():
                return path
    return None


def _say_missing(file: str, root: Path, missing: Counter[str]) -> str:
    names = [f"{name!r} ({count} task{'s' * (count > 1)})" for name, count in missing.most_common(3)]
    others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    first = missing.most_common(1)[0][0]
    return (
        f"{file}: no database file for {', '.join(names)}{others}; looked for {root / first / first}.sqlite and "
        f"{root / first}.sqlite; set data.source.database_root to the folder of the databases"
    )


def _sqlite_schema(database: Path, style: SchemaStyle) -> str:
    with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
        connection.text_factory = lambda text: text.decode("utf-8", errors="replace")
        tables = connection.execute(_TABLES_OF_SQLITE).fetchall()
        if style == "ddl":
            return "\n".join(f"{sql};" for _, sql in tables)
        rows = [
            (name, row[1]) for name, _ in tables for row in connection.execute(f"PRAGMA table_info({_quoted(name)})")
        ]
    return _compact(rows)


def _duckdb_schema(database: Path, style: SchemaStyle) -> str:
    import duckdb

    try:
        with duckdb.connect(str(database), read_only=True) as connection:
            if style == "ddl":
                return "\n".join(sql for (sql,) in connection.execute(_TABLES_OF_DUCKDB).fetchall())
            return _compact(connection.execute(_COLUMNS_OF_DUCKDB).fetchall())
    except duckdb.Error as error:
        raise DataError(f"{database}: the tables cannot be read ({error}); is it a database?") from error


def _compact(columns: list[tuple[str, str]]) -> str:
    tables: dict[str, list[str]] = {}
    for table, column in columns:
        tables.setdefault(table, []).append(_plain_or_quoted(column))
    return "\n".join(f"{_plain_or_quoted(table)}({', '.join(names)})" for table, names in tables.items())


def _plain_or_quoted(name: str) -> str:
    plain = name.isidentifier() and name.isascii() and f" {name.upper()} " not in _RESERVED
    return name if plain else _quoted(name)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
