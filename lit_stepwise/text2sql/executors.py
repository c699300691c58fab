"""Runs untrusted SQL in disposable worker processes, so that no statement can hang, fill or change the trainer."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import Executor
from lit_stepwise.text2sql import sqlite_worker
from lit_stepwise.text2sql.worker_pool import WorkerPool
from lit_stepwise.types import QueryResult

MIN_MEMORY_MB = 64  # a worker with much less does not start


@dataclass(eq=False)
class SQLiteExecutor(Executor):
    """Runs SQL on SQLite files, in worker processes that can read and nothing else.

    A worker that hangs is killed and replaced; one that dies is replaced and the statement tried once more. Workers
    start when they are first needed and end with ``close``, with this object, or with this process, however it ends. A
    copy has the same settings and workers of its own.
    """

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
    """Address space of one worker in MiB; SQLite itself gets a quarter of it."""

    _pool: WorkerPool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("num_workers", "max_rows", "max_bytes", "max_sql_chars"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} lets no statement run; use 1 or more")
        if not (math.isfinite(self.timeout_seconds) and self.timeout_seconds > 0):
            raise ConfigError(f"timeout_seconds={self.timeout_seconds} is no time to run in; use a few seconds")
        if self.memory_mb < MIN_MEMORY_MB:
            raise ConfigError(f"memory_mb={self.memory_mb} is too little to start in; use {MIN_MEMORY_MB} or more")
        self._pool = self._make_pool()

    def __reduce__(self) -> tuple[Callable[..., SQLiteExecutor], tuple[Any, ...]]:
        return type(self), tuple(getattr(self, setting.name) for setting in fields(self) if setting.init)

    def execute(self, database: Path, sql: str | None) -> QueryResult:
        """Run one statement read-only. Whatever the statement is, the answer is a result and never an exception."""
        if sql is None:
            return QueryResult("error", error="no statement was given")
        if len(sql) > self.max_sql_chars:
            return QueryResult("limit", error=f"the statement is longer than {self.max_sql_chars} characters")
        if self._pool.pid != os.getpid():  # after a fork: the workers and their pipes are the parent's
            self._pool = self._make_pool()
        return self._pool.run(
            {
                "database": os.path.abspath(database),
                "sql": sql,
                "timeout_seconds": self.timeout_seconds,
                "max_rows": self.max_rows,
                "max_bytes": self.max_bytes,
            }
        )

    def close(self) -> None:
        """End the workers, and with them what is running. Idempotent; a later statement starts new ones."""
        self._pool.close()

    def _make_pool(self) -> WorkerPool:
        arguments = ("-I", "-S", "-X", "utf8", sqlite_worker.__file__, str(self.memory_mb))
        pool = WorkerPool(self.num_workers, arguments, "SQLite")
        weakref.finalize(self, pool.close)  # also at exit
        return pool
