import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from lit_stepwise.sandbox import sqlite_worker
from lit_stepwise.sandbox.sqlite_worker import SQLiteSystem
from lit_stepwise.sandbox.worker import Request, answer

pytestmark = pytest.mark.clock

MEMORY_MB = 8192  # its heap limit holds for the whole process, which is that of the tests here
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c"


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "pets.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("""
            CREATE TABLE pet (id INTEGER PRIMARY KEY, name TEXT, weight REAL);
            INSERT INTO pet VALUES (1, 'Ada', 3.5), (2, 'Bo', 41.25), (3, 'Cleo', NULL);
            CREATE VIRTUAL TABLE note USING fts5(body);
            INSERT INTO note VALUES ('sleeps all day');
        """)
    return path


@pytest.fixture
def opened(monkeypatch):
    """The paths that were opened, in order."""
    paths, real = [], sqlite_worker.open_database

    def open_database(path, *arguments):
        paths.append(Path(path))
        return real(path, *arguments)

    monkeypatch.setattr(sqlite_worker, "open_database", open_database)
    return paths


def run(system, path, sql, seconds=5.0, max_rows=100):
    return answer(system, Request(str(path), sql, time.monotonic() + seconds, max_rows, 10**12), lambda part: None)


def snapshot(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), path.read_bytes(), path.stat().st_mtime_ns) for path in files]


def rename_pet(path, name):
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE pet SET name = ? WHERE id = 1", (name,))


def test_a_connection_only_reads_even_if_its_guard_let_everything_pass(database):
    before = snapshot(database.parent)
    with closing(sqlite_worker.open_database(str(database), lambda *_: sqlite3.SQLITE_OK, lambda: False)) as connection:
        settings = ("query_only", "trusted_schema", "temp_store", "cell_size_check", "cache_size")
        values = [connection.execute(f"PRAGMA {name}").fetchone() for name in settings]
        assert values == [(1,), (0,), (2,), (1,), (-512,)]
        connection.execute("PRAGMA query_only = 0")
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("DELETE FROM pet")
        with pytest.raises(sqlite3.OperationalError, match="too many attached"):
            connection.execute(f"ATTACH '{database.parent}/planted.sqlite' AS p")
    assert snapshot(database.parent) == before


def test_a_file_is_opened_once_for_many_statements(database, opened):
    system = SQLiteSystem(MEMORY_MB)
    for number in range(5):
        assert run(system, database, f"SELECT {number}")["rows"] == [(number,)]
    assert opened == [database]


@pytest.mark.parametrize(
    "sql", ["SELEC", "SELECT nope FROM pet", "SELECT abs(-9223372036854775808)", "SELECT 1; SELECT 2"]
)
def test_a_wrong_statement_costs_no_connection(database, opened, sql):
    system = SQLiteSystem(MEMORY_MB)
    assert run(system, database, sql)["status"] == "error"
    assert run(system, database, "SELECT 7")["rows"] == [(7,)]
    assert opened == [database]


@pytest.mark.parametrize("sql", ["DROP TABLE pet", "SELECT random()", "CREATE TEMP TABLE t(x)"])
def test_a_refused_statement_costs_no_connection_and_is_not_remembered(database, opened, sql):
    system = SQLiteSystem(MEMORY_MB)
    assert run(system, database, sql)["status"] == "denied"
    assert run(system, database, "SELECT nope FROM pet")["status"] == "error"
    assert opened == [database]


@pytest.mark.parametrize(
    ("sql", "status"),
    [
        (ENDLESS, "timeout"),
        ("SELECT zeroblob(100000000)", "limit"),
        (ENDLESS.replace("max(x)", "x"), "timeout"),  # between rows
        ("SELECT '\ud800'", "error"),  # which Python raises and SQLite never saw
    ],
)
def test_a_connection_on_which_anything_else_went_wrong_is_not_used_again(database, opened, sql, status):
    system = SQLiteSystem(MEMORY_MB)
    assert run(system, database, sql, seconds=0.1, max_rows=10**9)["status"] == status
    assert run(system, database, "SELECT 7")["rows"] == [(7,)]
    assert opened == [database, database]


def test_a_deadline_is_that_of_the_statement_and_not_of_the_first_on_its_connection(database, opened):
    system = SQLiteSystem(MEMORY_MB)
    count = ENDLESS.replace("FROM c)", "FROM c WHERE x < 300000)")
    assert run(system, database, "SELECT 7", seconds=0.05)["rows"] == [(7,)]
    time.sleep(0.06)
    assert run(system, database, count)["rows"] == [(300_000,)]
    assert run(system, database, count, seconds=0.02)["status"] == "timeout"
    assert opened == [database]


def test_a_statement_on_a_used_connection_ends_as_on_a_fresh_one(database):
    statements = [
        "SELECT * FROM pet ORDER BY id",
        "CREATE TEMP TABLE pet AS SELECT 99 AS id",
        "CREATE TEMP VIEW pet AS SELECT 99 AS id",
        "SELECT * FROM pet ORDER BY id",
        "SELECT * FROM temp.sqlite_master",
        "SELECT random()",
        "SELECT id FROM pet, pet AS other, pet AS third, pet AS fourth, pet AS fifth",  # cut after 100 rows
        "PRAGMA case_sensitive_like = 1",
        "SELECT 'a' LIKE 'A'",
        "PRAGMA table_info('pet')",
        "SELECT body FROM note WHERE note MATCH 'day'",
        "SELECT * FROM note WHERE note MATCH '\"'",
        "SELECT changes(), total_changes(), last_insert_rowid()",
        "BEGIN",
        "COMMIT",
        "SELECT abs(-9223372036854775808) FROM pet",
        "PRAGMA query_only = 0",
        "DELETE FROM pet",
        "SELECT count(*) FROM pet",
        "SELECT value FROM json_each('[1, 2]')",
        "PRAGMA cache_size = 0",
        "PRAGMA cache_size",
        "SAVEPOINT s",
        "SELECT '\ud800'",
        "EXPLAIN QUERY PLAN SELECT * FROM pet",
    ]
    fresh = [run(SQLiteSystem(MEMORY_MB), database, sql) for sql in statements]
    used = SQLiteSystem(MEMORY_MB)
    for _ in range(3):
        assert [run(used, database, sql) for sql in statements] == fresh
        statements, fresh = statements[::-1], fresh[::-1]
    assert {each["status"] for each in fresh} == {"ok", "error", "denied"}


def test_a_file_that_was_changed_in_place_is_opened_anew(database, opened):
    system = SQLiteSystem(MEMORY_MB)
    before = database.stat()
    assert run(system, database, "SELECT name FROM pet LIMIT 1")["rows"] == [("Ada",)]
    rename_pet(database, "Ida")  # as many bytes
    assert (database.stat().st_ino, database.stat().st_size) == (before.st_ino, before.st_size)
    assert run(system, database, "SELECT name FROM pet LIMIT 1")["rows"] == [("Ida",)]
    assert opened == [database, database]


def test_a_file_that_took_the_place_of_another_is_opened_anew_though_its_time_and_size_are_the_same(database, opened):
    system = SQLiteSystem(MEMORY_MB)
    other = Path(shutil.copy(database, database.with_name("other.sqlite")))
    rename_pet(other, "Ida")
    found = database.stat()
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert run(system, database, "SELECT name FROM pet LIMIT 1")["rows"] == [("Ada",)]
    os.replace(other, database)
    assert (database.stat().st_size, database.stat().st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    assert run(system, database, "SELECT name FROM pet LIMIT 1")["rows"] == [("Ida",)]
    assert opened == [database, database]


def test_a_journal_that_appears_later_is_seen_and_so_is_a_file_that_went_away(database):
    system = SQLiteSystem(MEMORY_MB)
    assert run(system, database, "SELECT 7")["status"] == "ok"
    journal = Path(f"{database}-wal")
    journal.write_bytes(b"x")
    assert "unfinished journal" in run(system, database, "SELECT 7")["error"]
    journal.unlink()
    assert run(system, database, "SELECT 7")["status"] == "ok"
    database.unlink()
    assert run(system, database, "SELECT 7")["error"] == "database pets.sqlite cannot be read: there is no such file"


def test_the_connections_used_last_stay_open(database, opened):
    system = SQLiteSystem(64)  # a heap of 16 MiB, and one connection for each 8
    paths = [Path(shutil.copy(database, database.with_name(f"{name}.sqlite"))) for name in "abc"]
    for index in (0, 1, 0, 2, 0, 1):
        run(system, paths[index], "SELECT 7")
    assert opened == [paths[index] for index in (0, 1, 2, 1)]
    assert len(system._connections) == 2
