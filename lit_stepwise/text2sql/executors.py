"""Runs untrusted SQL in disposable worker processes, so that no statement can hang, fill or change the trainer."""

from __future__ import annotations

import asyncio
import math
import os
import sqlite3
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_args

from lit_stepwise import sandbox
from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import Executor
from lit_stepwise.sandbox.pool import Counters, WorkerPool
from lit_stepwise.text2sql.result_cache import ContentHashes, ResultCache
from lit_stepwise.text2sql.statements import is_time_dependent
from lit_stepwise.types import QueryResult, QueryStatus

BLANKS = " \t\n\r\f"  # what both systems take for blanks
PROGRAMS = Path(sandbox.__file__).parent
SYSTEMS = {"SQLite": (0, b"SQLite format 3\0"), "DuckDB": (8, b"DUCK")}
"""Which bytes of a file, from where on, tell whose it is."""


@dataclass(eq=False)
class WorkerExecutor(Executor):
    """What the executors of all systems share: settings, worker processes, a cache.

    A worker that hangs is killed and replaced. One that dies is replaced and the statement tried again: a statement
    that crashes two workers is a ``limit``, while one whose workers are killed from outside again and again is
    ``infra``. Workers start when they are first needed and end with ``close``, with this object, or with this process,
    however it ends. A copy has the same settings and workers of its own, and so has a forked process.

    Statements run without the blanks around them and the semicolons at their end, and that is the text by which their
    results are remembered: to the letter, for columns are named after it.
    """

    system: ClassVar[str]
    flags: ClassVar[Sequence[str]]
    """Of Python, for the worker program."""
    journals: ClassVar[Sequence[str]]
    """Suffixes of files next to a database which hold changes that the file itself lacks."""
    min_memory_mb: ClassVar[int]
    """With much less a worker does not start."""

    num_workers: int = 2
    """Worker processes; as many statements run at a time, the rest wait in the order in which they came."""
    timeout_seconds: float = 5.0
    """Time of one statement."""
    max_rows: int = 5000
    """Rows of one result; one that has more is cut and marked as truncated."""
    max_bytes: int = 4_000_000
    """Size of one result, 8 bytes per value plus text and blobs; one that has more is cut and marked as truncated."""
    max_sql_chars: int = 20_000
    """Length of one statement; a longer one is not run."""
    memory_mb: int = 1024
    """Address space of one worker in MiB."""
    cache_mb: int = 64
    """Results kept in MiB of this process, for the next time that a statement is asked of the same contents; 0: none.
    Statements that depend on the time or on chance run every time."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "max_rows", "max_bytes", "max_sql_chars"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} lets no statement run; use 1 or more")
        if not (math.isfinite(self.timeout_seconds) and self.timeout_seconds > 0):
            raise ConfigError(f"timeout_seconds={self.timeout_seconds} is no time to run in; use a few seconds")
        if self.memory_mb < self.min_memory_mb:
            raise ConfigError(f"memory_mb={self.memory_mb} is too little to start in; use {self.min_memory_mb} or more")
        if self.cache_mb < 0:
            raise ConfigError(f"cache_mb={self.cache_mb} is negative; use 0 to keep no results")
        self._live = self._make_live()

    def __reduce__(self) -> tuple[Callable[..., WorkerExecutor], tuple[Any, ...]]:
        return type(self), tuple(getattr(self, setting.name) for setting in fields(self) if setting.init)

    def execute(self, database: Path, sql: str | None) -> QueryResult:
        """Run one statement read-only. Whatever the statement is, the answer is a result and never an exception."""
        live = self._here()
        return self._execute(live, live.pool.num_closes, database, sql)

    async def aexecute(self, database: Path, sql: str | None) -> QueryResult:
        """The same for an event loop, which goes on meanwhile. Threads wait for the workers, one for each."""
        live = self._here()
        asked, num_closes = time.monotonic(), live.pool.num_closes

        def begin() -> QueryResult:
            live.pool.counters.add(queue_seconds=time.monotonic() - asked)
            return self._execute(live, num_closes, database, sql)

        return await asyncio.wrap_future(live.submit(begin))

    def stats(self) -> Mapping[str, float]:
        """What it did since it was made, by name; only ever grows.

        ``statements`` is the sum of the six statuses; ``cache_hits`` of them ran nothing. Of workers: ``starts``,
        ``kills`` (they overran their time) and ``crashes`` (they died otherwise). ``queue_seconds`` passed in waiting
        for a free worker, ``run_seconds`` with one.
        """
        return self._here().stats()

    def close(self) -> None:
        """End the workers, and with them what is running. Idempotent; a later statement starts new ones."""
        self._here().close()

    def _execute(self, live: _Live, num_closes: int, database: Path, sql: str | None) -> QueryResult:
        hit = False
        if sql is None:
            result = QueryResult("error", error="no statement was given")
        elif len(sql) > self.max_sql_chars:
            result = QueryResult("limit", error=f"the statement is longer than {self.max_sql_chars} characters")
        else:
            statement = sql.lstrip(BLANKS).rstrip(BLANKS + ";")
            result, hit = self._answer(live, num_closes, os.path.abspath(database), statement)
        live.counters.add(statements=1, cache_hits=hit, **{result.status: 1})
        return result

    def _answer(self, live: _Live, num_closes: int, path: str, sql: str) -> tuple[QueryResult, bool]:
        """The result, and whether it came without running the statement."""
        request = {
            "database": path,
            "sql": sql,
            "timeout_seconds": self.timeout_seconds,
            "max_rows": self.max_rows,
            "max_bytes": self.max_bytes,
        }
        content = live.hashes.of(path) if self.cache_mb else None
        if content is None:
            return self._run(live, num_closes, request)[0], False

        def run() -> tuple[QueryResult, int | None]:
            result, num_bytes = self._run(live, num_closes, request)
            return result, num_bytes + len(sql) if live.hashes.of(path) == content else None

        limits = (self.timeout_seconds, self.max_rows, self.max_bytes, self.memory_mb)
        # the name of the file as well, by which a statement may call its database
        key = (content, os.path.basename(path), live.version, sql, limits)
        if (known := live.cache.get(key)) is not None:
            return known, True
        if is_time_dependent(sql):
            return run()[0], False
        return live.cache.get_or_run(key, run)

    def _run(self, live: _Live, num_closes: int, request: Mapping[str, Any]) -> tuple[QueryResult, int]:
        result, num_bytes = live.pool.run(request, num_closes)
        if result.status == "infra" and (other := _system_of(request["database"])) not in ("", self.system):
            name = os.path.basename(request["database"])
            error = f"needs executor {other}Executor: {name} is a {other} database"
            result = QueryResult("infra", error=error, seconds=result.seconds)
        return result, num_bytes

    def _here(self) -> _Live:
        if self._live.pid != os.getpid():  # after a fork: the workers, their pipes and any locks are the parent's
            self._live = self._make_live()
        return self._live

    def _make_live(self) -> _Live:
        program = PROGRAMS / f"{self.system.lower()}_worker.py"
        pool = WorkerPool(self.num_workers, (*self.flags, str(program), str(self.memory_mb)), self.system)
        live = _Live(pool, self._version(), ContentHashes(self.journals), ResultCache(self.cache_mb << 20))
        weakref.finalize(self, live.close)  # also at exit
        return live

    @abstractmethod
    def _version(self) -> str:
        """Of the library that runs the statements."""


@dataclass(eq=False)
class SQLiteExecutor(WorkerExecutor):
    """Runs SQL on SQLite files, in worker processes that can read and nothing else."""

    system = "SQLite"
    flags = ("-I", "-S", "-X", "utf8")
    journals = ("-wal", "-journal")
    min_memory_mb = 64

    memory_mb: int = 1024
    """Address space of one worker in MiB; SQLite itself gets a quarter of it."""

    def _version(self) -> str:
        return sqlite3.sqlite_version


@dataclass(eq=False)
class DuckDBExecutor(WorkerExecutor):
    """Runs SQL on DuckDB files, in worker processes that can read and nothing else."""

    system = "DuckDB"
    flags = ("-I", "-X", "utf8")  # without -S, to find duckdb
    journals = (".wal",)
    min_memory_mb = 256  # an idle worker takes 182

    memory_mb: int = 1024
    """Address space of one worker in MiB; DuckDB's own memory limit is a quarter of it."""

    def _version(self) -> str:
        from importlib import metadata

        return metadata.version("duckdb")


class _Live:
    """What an executor has in one process, besides its settings."""

    def __init__(self, pool: WorkerPool, version: str, hashes: ContentHashes, cache: ResultCache) -> None:
        self.pid = os.getpid()
        self.pool = pool
        self.version = version
        self.hashes = hashes
        self.cache = cache
        self.counters = Counters("statements", "cache_hits", *get_args(QueryStatus))
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def submit(self, begin: Callable[[], QueryResult]) -> Future[QueryResult]:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.pool.size, thread_name_prefix="sql")
            return self._threads.submit(begin)

    def stats(self) -> dict[str, float]:
        return {**self.counters.read(), **self.pool.counters.read()}

    def close(self) -> None:
        if self.pid != os.getpid():  # after a fork a lock may be held for ever by a thread that is not here
            return
        self.pool.close()
        self.cache.clear()
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False)  # what still waits there finds the pool closed


def _system_of(path: str) -> str:
    """Whose file it is, by its first bytes; empty where that cannot be told."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except (OSError, ValueError):
        return ""
    return next((name for name, (start, magic) in SYSTEMS.items() if head[start:].startswith(magic)), "")
