"""A program of its own that runs untrusted SQL on SQLite files: it reads requests on stdin and answers on stdout.

It uses the standard library alone, so that it starts without the package (``python -I -S sqlite_worker.py MEMORY_MB``),
and it ends when its stdin does. Every message is a length (4 bytes, little-endian) and that many bytes of JSON:

    request   id, database, sql, timeout_seconds, max_rows, max_bytes
    answer    id, status, and columns, rows, truncated  or  error
"""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import signal
import sqlite3
import struct
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

HEADER = struct.Struct("<I")
ORPHAN_SECONDS = 2.0  # beyond the timeout: a worker that nobody is left to kill ends itself

LIMITS = {
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,  # mode=ro alone lets ATTACH create new files
    sqlite3.SQLITE_LIMIT_LENGTH: 10_000_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 1_000_000,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 500,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 100,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 2_000_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1000,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
PRAGMAS = {
    *("table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo", "foreign_key_list"),
    "data_version",  # full-text search asks for it
}
DENIED_FUNCTIONS = {
    *("load_extension", "fts3_tokenizer", "fts5", "matchinfo", "optimize", "rtreecheck", "sqlite_log", "sqlite_offset"),
    *("random", "randomblob"),  # an answer must be the same twice
}
TABLE_FUNCTIONS = (
    *("json_each", "json_tree", "pragma_table_info", "pragma_table_xinfo", "pragma_table_list"),
    *("pragma_index_list", "pragma_index_info", "pragma_index_xinfo", "pragma_foreign_key_list"),
)
PATH = r"(?<![\w.)])(?:/[\w.%+~-]+){2,}/?"


def pack(message: dict[str, Any]) -> bytes:
    """A message as it travels. Python's JSON holds all that SQLite does (infinities, 64-bit integers) except bytes."""
    data = json.dumps(message, default=lambda blob: {"base64": base64.b64encode(blob).decode("ascii")}).encode("ascii")
    return HEADER.pack(len(data)) + data


def unpack(data: bytes) -> dict[str, Any]:
    """The message that ``pack`` made, without its header."""
    message: dict[str, Any] = json.loads(
        data, object_hook=lambda found: base64.b64decode(found["base64"]) if found.keys() == {"base64"} else found
    )
    return message


class Guard:
    """Decides what a statement may do (an allow-list), and remembers what it refused first."""

    def __init__(self) -> None:
        self.refused = ""

    def __call__(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        """SQLite's authorizer: the names that an action is about, as far as it has any."""
        if action in READING:
            return sqlite3.SQLITE_OK
        refused = "anything but one SELECT that reads this database"
        if action == sqlite3.SQLITE_FUNCTION:
            if (second or "").lower() not in DENIED_FUNCTIONS:
                return sqlite3.SQLITE_OK
            refused = f"function {second}"
        if action == sqlite3.SQLITE_PRAGMA:
            if (first or "").lower() in PRAGMAS:
                return sqlite3.SQLITE_OK
            refused = f"PRAGMA {first}"
        self.refused = self.refused or refused
        return sqlite3.SQLITE_DENY


def confine(memory_mb: int) -> None:
    """Give up what no statement needs: address space, writing files, core dumps, open files, the working directory."""
    os.chdir("/")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # both are inherited, and the alarm has to end this process
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    wanted = {
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 32,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(f"PRAGMA hard_heap_limit={(memory_mb << 20) // 4}")  # holds for the whole process


def open_database(path: Path, guard: Guard, expired: Callable[[], bool]) -> sqlite3.Connection:
    """A connection that can only read. Raises ``sqlite3.Error``, ``OSError`` or ``ValueError`` where it cannot."""
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    for suffix in ("-wal", "-journal"):  # immutable=1 would read past them
        journal = path.with_name(path.name + suffix)
        if journal.exists() and journal.stat().st_size:
            raise OSError("it has an unfinished journal; open it once with SQLite to complete it")
    connection = sqlite3.connect(
        path.as_uri() + "?mode=ro&immutable=1", uri=True, isolation_level=None, cached_statements=0
    )
    try:
        for limit, value in LIMITS.items():
            connection.setlimit(limit, value)
        for pragma in ("query_only=1", "trusted_schema=0", "temp_store=MEMORY", "cell_size_check=1"):
            connection.execute(f"PRAGMA {pragma}")
        connection.text_factory = lambda text: text.decode("utf-8", "replace")  # as it is where it is valid
        connection.set_progress_handler(expired, 2000)
        connect_virtual_tables(connection)
        connection.set_authorizer(guard)
    except BaseException:
        connection.close()
        raise
    return connection


def connect_virtual_tables(connection: sqlite3.Connection) -> None:
    """Touch table functions and virtual tables: the first use of each declares it, which the guard would refuse."""
    virtual = connection.execute("SELECT name FROM sqlite_master WHERE sql LIKE 'CREATE VIRTUAL%'").fetchall()
    for name in (*TABLE_FUNCTIONS, *(str(name).replace('"', '""') for (name,) in virtual)):
        with suppress(sqlite3.Error):
            connection.execute(f'SELECT 1 FROM "{name}" LIMIT 0')


def run(connection: sqlite3.Connection, request: dict[str, Any], expired: Callable[[], bool]) -> dict[str, Any]:
    """The answer to one statement, row by row up to the caps."""
    cursor = connection.execute(request["sql"])
    if cursor.description is None:
        return {"status": "error", "error": "the statement returns no table; write one SELECT statement"}
    columns = [column[0] for column in cursor.description]
    rows: list[tuple[Any, ...]] = []
    num_bytes = 0
    for row in cursor:
        num_bytes += size(row)
        if len(rows) == request["max_rows"] or num_bytes > request["max_bytes"]:
            return {"status": "ok", "columns": columns, "rows": rows, "truncated": True}
        rows.append(row)
        if expired():
            raise TimeoutError
    return {"status": "ok", "columns": columns, "rows": rows, "truncated": False}


def size(row: Iterable[Any]) -> int:
    """Bytes of a row: 8 per value, and the length of text (as UTF-8) and blobs."""
    total = 0
    for value in row:
        total += 8
        if isinstance(value, str):
            total += len(value.encode("utf-8"))
        elif isinstance(value, bytes):
            total += len(value)
    return total


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one request; whatever goes wrong is an answer too."""
    path = Path(request["database"])
    deadline: float = time.monotonic() + request["timeout_seconds"]
    guard = Guard()

    def expired() -> bool:
        return time.monotonic() > deadline

    try:
        connection = open_database(path, guard, expired)
    except (OSError, ValueError, sqlite3.Error, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "too little memory"
        return {"status": "infra", "error": scrub(f"database {path.name} cannot be read: {reason}", path)}
    try:
        with closing(connection):
            return run(connection, request, expired)
    except Exception as error:
        status, text = classify(error, guard)
        return {"status": status, "error": scrub(text, path)}


def classify(error: Exception, guard: Guard) -> tuple[str, str]:
    """Status and text of what a statement raised."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    if guard.refused or code & 0xFF in (sqlite3.SQLITE_AUTH, sqlite3.SQLITE_READONLY):
        return "denied", f"not allowed: {guard.refused or 'the database can only be read'}"
    if isinstance(error, TimeoutError) or code & 0xFF == sqlite3.SQLITE_INTERRUPT:
        return "timeout", "the statement took too long"
    out_of_space = (sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_NOMEM)
    if isinstance(error, MemoryError) or code in out_of_space:
        return "limit", f"the statement needs too much memory {f'({error})' if str(error) else ''}"
    if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
        return "infra", f"the database cannot be read: {error}"
    if isinstance(error, UnicodeError):
        return "error", "the statement is not valid text"
    if isinstance(error, sqlite3.Error):
        return "error", str(error)
    return "infra", f"the worker failed with {type(error).__name__}"


def scrub(text: str, path: Path) -> str:
    """One line of at most 300 characters, without paths."""
    known = "|".join(re.escape(str(folder)) for folder in (path, *path.parents[:-1]))  # may hold blanks
    text = " ".join(re.sub(rf"(?:{known})[\w./%+~-]*|{PATH}", "<path>", text).split())
    return text if len(text) <= 300 else text[:297] + "..."


def main() -> None:
    """Answer until stdin ends."""
    confine(int(sys.argv[1]))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    answers.write(pack({"id": 0}))  # ready
    answers.flush()
    while header := requests.read(HEADER.size):
        request = unpack(requests.read(*HEADER.unpack(header)))
        signal.setitimer(signal.ITIMER_REAL, request["timeout_seconds"] + ORPHAN_SECONDS)
        answers.write(pack({"id": request["id"], **answer(request)}))
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
