import asyncio
import copy
import gc
import math
import os
import pickle
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest

from lit_stepwise.errors import ConfigError
from lit_stepwise.sandbox.pool import MAX_KILLS
from lit_stepwise.sandbox.sqlite_worker import MAX_CONNECTIONS
from lit_stepwise.text2sql.executors import DuckDBExecutor, SQLiteExecutor
from tests.waiting import has_open, wait_until

pytestmark = pytest.mark.clock

COUNT_TO = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c {}) SELECT max(x) FROM c"
SORT_MEGABYTES = (
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT {0})"
    " SELECT sum(length(s)) FROM (SELECT printf('%1000000d', x) AS s FROM c ORDER BY 1)"
)
ENDLESS = COUNT_TO.format("")
HANG = "SELECT instr(zeroblob(9e6), zeroblob(1e5) || x'01')"  # one opcode of minutes, which no handler can interrupt


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "my pets #1" / "pets.sqlite"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("""
            CREATE TABLE pet (id INTEGER PRIMARY KEY, name TEXT, weight REAL);
            INSERT INTO pet VALUES (1, 'Ada', 3.5), (2, 'Bo', 41.25), (3, 'Cleo', NULL);
            CREATE VIRTUAL TABLE note USING fts5(body);
            INSERT INTO note VALUES ('sleeps all day');
        """)
    return path


@pytest.fixture
def executor():
    executor = SQLiteExecutor(num_workers=1, timeout_seconds=1.0)
    yield executor
    executor.close()
    assert children() == []


def children(parent=None):
    """Ids of the worker processes of ``parent`` (this process), zombies included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue
        if int(rest.split()[1]) == (parent or os.getpid()) and name.startswith("python"):
            found.append(int(stat.parent.name))
    return found


def is_running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def snapshot(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), path.read_bytes(), path.stat().st_mtime_ns) for path in files]


def test_a_result_has_columns_and_rows_in_order(executor, database):
    result = executor.execute(database, "SELECT name, weight AS kg FROM pet ORDER BY id DESC")
    assert result.status == "ok"
    assert result.columns == ("name", "kg")
    assert result.rows == (("Cleo", None), ("Bo", 41.25), ("Ada", 3.5))
    assert not result.truncated
    assert result.error == ""
    assert 0 < result.seconds < 1


def test_every_kind_of_value_comes_back_exactly(executor, database):
    values = (2**63 - 1, -(2**63), 2**53 + 1, 0.1, 5e-324, math.inf, -math.inf, -0.0, b"\x00\xff", b"", "ü\0\n€𝄞", "")
    sql = (
        "SELECT 9223372036854775807, -9223372036854775807 - 1, 9007199254740993, 0.1, 5e-324, 9e999, -9e999, -0.0,"
        " x'00ff', x'', 'ü' || char(0, 10) || '€𝄞', ''"
    )
    (row,) = executor.execute(database, sql).rows
    assert list(map(repr, row)) == list(map(repr, values))


def test_text_that_is_not_utf8_is_replaced_and_not_an_error(executor, database):
    result = executor.execute(database, "SELECT CAST(x'41c328' AS TEXT), 'ß'")
    assert result.rows == (("A\ufffd(", "ß"),)


@pytest.mark.parametrize(
    "sql",
    [
        "EXPLAIN QUERY PLAN SELECT * FROM pet",
        "PRAGMA table_info('pet')",
        "SELECT * FROM pragma_table_info('pet')",
        "SELECT value FROM json_each('[1]')",
        "SELECT bm25(note), body FROM note WHERE note MATCH 'day'",
        "SELECT sql FROM sqlite_master",
        "WITH x AS (SELECT max(weight) AS w FROM pet) SELECT w FROM x;  -- done",
        "VALUES (1)",
    ],
)
def test_reading_is_allowed_in_every_form(executor, database, sql):
    result = executor.execute(database, sql)
    assert (result.status, result.error) == ("ok", "")
    assert result.rows


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO pet VALUES (4, 'Dot', 1)",
        "WITH x AS (SELECT 1) DELETE FROM pet",
        "UPDATE pet SET name = 'x' RETURNING id",
        "DROP TABLE pet",
        "CREATE TEMP TABLE t AS SELECT 1",
        "EXPLAIN DELETE FROM pet",
        "INSERT INTO note(note) VALUES ('optimize')",
        "ATTACH '{folder}/planted.sqlite' AS p",
        "ATTACH '{database}' AS p",
        "VACUUM",
        "VACUUM INTO '{folder}/planted.sqlite'",
        "BEGIN EXCLUSIVE",
        "ANALYZE",
        "PRAGMA journal_mode = WAL",
        "PRAGMA query_only = 0",
        "PRAGMA hard_heap_limit = 20000",
        "PRAGMA database_list",
        "SELECT * FROM pragma_database_list",
        "SELECT * FROM dbstat",
        "SELECT load_extension('{folder}/evil.so')",
        "SELECT random()",
    ],
)
def test_anything_but_reading_is_denied_and_changes_nothing(executor, database, sql):
    before = snapshot(database.parent)
    result = executor.execute(database, sql.format(folder=database.parent, database=database))
    assert result.status == "denied"
    assert result.error.startswith("not allowed: ")
    assert str(database.parent) not in result.error
    assert snapshot(database.parent) == before
    assert executor.execute(database, "SELECT count(*) FROM pet").rows == ((3,),)


@pytest.mark.parametrize(
    "sql",
    [
        *(None, "", " \n", "-- nothing", ";", "SELEC 1", "SELECT nope FROM pet", "SELECT ?"),
        *("SELECT 1; SELECT 2", "SELECT '\ud800'", "SELECT '\0'", "SELECT * FROM pet WHERE name MATCH 'x'"),
    ],
)
def test_a_wrong_statement_is_an_error_and_no_exception(executor, database, sql):
    result = executor.execute(database, sql)
    assert result.status == "error"
    assert result.error


def test_a_statement_that_is_no_text_is_told_so_in_words(executor, database):
    assert executor.execute(database, "SELECT '\ud800'").error == "the statement is not valid text"


@pytest.mark.parametrize(
    "sql",
    [
        'SELECT * FROM "{database}"',
        'SELECT * FROM "{folder}/other pets.sqlite"',
        'SELECT * FROM "/etc/hosts.d/x"',
        'SELECT "a\nb" FROM "{database}\n"',
    ],
)
def test_an_error_is_one_line_without_paths(executor, database, sql):
    result = executor.execute(database, sql.format(folder=database.parent, database=database))
    assert result.status == "error"
    assert "no such" in result.error
    assert "\n" not in result.error
    assert not any(part in result.error for part in ("/", "pets #1", database.parts[1]))


def test_an_error_is_short_however_long_the_statement(executor, database):
    assert len(executor.execute(database, f"SELECT {'x' * 9000}").error) == 300


def test_a_statement_that_is_too_long_is_a_limit(database):
    executor = SQLiteExecutor(max_sql_chars=9)
    assert executor.execute(database, "SELECT 12 ").status == "limit"
    with closing(executor):
        assert executor.execute(database, "SELECT 12").rows == ((12,),)


def test_rows_beyond_the_cap_are_cut_and_said_so(database):
    with closing(SQLiteExecutor(num_workers=1, max_rows=2)) as executor:
        exact = executor.execute(database, "SELECT id FROM pet ORDER BY id LIMIT 2")
        more = executor.execute(database, "SELECT id FROM pet ORDER BY id")
        endless = executor.execute(database, ENDLESS.replace("max(x)", "x"))
    assert (exact.rows, exact.truncated) == (((1,), (2,)), False)
    assert (more.rows, more.truncated) == (((1,), (2,)), True)
    assert (endless.rows, endless.truncated) == (((1,), (2,)), True)


def test_bytes_beyond_the_cap_are_cut_and_said_so(database):
    with closing(SQLiteExecutor(num_workers=1, max_bytes=39)) as executor:
        # 8 + 2 bytes of text, 8 + 5 of a blob, 8 of the integer, 8 of the NULL: 39 in all, and 40 with a longer text
        exact = executor.execute(database, "VALUES ('ü', x'0102030405'), (5, NULL)")
        more = executor.execute(database, "VALUES ('üx', x'0102030405'), (5, NULL)")
        cell = executor.execute(database, "SELECT zeroblob(9000000)")
    assert (exact.rows, exact.truncated) == ((("ü", b"\1\2\3\4\5"), (5, None)), False)
    assert (more.rows, more.truncated) == ((("üx", b"\1\2\3\4\5"),), True)
    assert (cell.rows, cell.truncated, cell.status) == ((), True, "ok")


def test_an_endless_query_stops_at_its_deadline_and_the_worker_lives_on(executor, database):
    executor.execute(database, "SELECT 1")
    before = children()
    result = executor.execute(database, ENDLESS)
    assert result.status == "timeout"
    assert 1.0 <= result.seconds < 6
    assert executor.execute(database, "SELECT 7").rows == ((7,),)
    assert children() == before


def test_a_hang_that_cannot_be_interrupted_is_killed_and_the_worker_replaced(executor, database):
    executor.execute(database, "SELECT 1")
    before = children()
    result = executor.execute(database, HANG)
    assert result.status == "timeout"
    assert 1.5 <= result.seconds < 6
    assert executor.execute(database, "SELECT 7").rows == ((7,),)
    assert set(children()).isdisjoint(before)


def test_a_worker_that_reads_no_more_is_killed_however_long_the_statement(database):
    with closing(SQLiteExecutor(num_workers=1, timeout_seconds=0.2, max_sql_chars=300_000)) as executor:
        executor.execute(database, "SELECT 1")
        os.kill(*children(), signal.SIGSTOP)
        assert executor.execute(database, f"SELECT 7 -- {'x' * 200_000}").status == "timeout"
        assert executor.execute(database, f"SELECT 7 -- {'x' * 200_000}").rows == ((7,),)


def test_a_worker_is_replaced_only_when_no_other_is_idle(database):
    with closing(SQLiteExecutor(num_workers=2, timeout_seconds=0.3)) as executor, ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda number: executor.execute(database, f"{ENDLESS} -- {number}"), range(2)))
        assert len(children()) == 2
        executor.execute(database, HANG)
        assert executor.execute(database, "SELECT 7").rows == ((7,),)
        assert len(children()) == 1


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT zeroblob(900000000)",
        SORT_MEGABYTES.format(1000),
        SORT_MEGABYTES.format(100),  # within the 256 of the process, beyond the 64 of SQLite
    ],
)
def test_a_memory_bomb_is_a_limit_and_the_worker_lives_on(database, sql):
    with closing(SQLiteExecutor(num_workers=1, memory_mb=256)) as executor:
        assert executor.execute(database, sql).status == "limit"
        assert executor.execute(database, SORT_MEGABYTES.format(20)).rows == ((20_000_000,),)


def test_a_worker_may_write_no_file_and_hold_little_memory(executor, database):
    executor.execute(database, "SELECT 1")
    (pid,) = children()
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in lines}
    assert limits["Max file size"] == ["0", "0"]
    assert limits["Max core file size"] == ["0", "0"]
    assert limits["Max address space"] == [str(1024 << 20)] * 2
    assert limits["Max open files"] == ["48", "48"]
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    assert Path(f"/proc/{pid}/environ").read_bytes() == b""


def test_a_worker_may_have_all_its_connections_open(executor, database):
    paths = [shutil.copy(database, database.with_name(f"{number}.sqlite")) for number in range(MAX_CONNECTIONS + 2)]
    for path in (*paths, *paths):
        assert executor.execute(path, "SELECT count(*) FROM pet, pet AS other").rows == ((9,),)
    (pid,) = children()
    opened = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
    assert sum(name.endswith(".sqlite") for name in opened) == MAX_CONNECTIONS


def test_a_database_that_cannot_be_read_is_our_fault_and_named_without_its_folder(executor, database):
    garbage = database.with_name("garbage.sqlite")
    garbage.write_bytes(b"no database at all " * 99)
    unfinished = shutil.copy(database, database.with_name("unfinished.sqlite"))
    Path(f"{unfinished}-wal").write_bytes(b"x")
    before = snapshot(database.parent)
    reasons = {"missing": "no such file", "garbage": "not a database", "unfinished": "unfinished journal"}
    for name, reason in reasons.items():
        result = executor.execute(database.with_name(f"{name}.sqlite"), "SELECT 1")
        assert result.status == "infra"
        assert f"{name}.sqlite" in result.error
        assert reason in result.error
        assert "/" not in result.error
    assert snapshot(database.parent) == before


def test_a_worker_killed_between_statements_is_replaced_unseen(executor, database):
    for answer in (11, 12, 13):
        assert executor.execute(database, f"SELECT {answer}").rows == ((answer,),)
        (pid,) = children()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not is_running(pid))


def test_a_worker_killed_once_during_a_statement_costs_nothing_but_time(database):
    with closing(SQLiteExecutor(num_workers=1, timeout_seconds=9.0)) as executor, ThreadPoolExecutor(1) as threads:
        executor.execute(database, "SELECT 1")
        answer = threads.submit(executor.execute, database, COUNT_TO.format("WHERE x < 1500000"))
        time.sleep(0.1)
        os.kill(*children(), signal.SIGKILL)
        assert answer.result().rows == ((1_500_000,),)


def end_workers(database, how_many, with_signal):
    """Send each of the next workers a signal in the middle of its statement."""
    ended = set()
    while len(ended) < how_many:
        for pid in set(children()) - ended:
            wait_until(lambda pid=pid: has_open(pid, database))
            time.sleep(0.1)
            os.kill(pid, with_signal)
            ended.add(pid)


def test_a_statement_that_crashes_two_workers_is_a_limit(executor, database):
    executor.execute(database, "SELECT 1")
    with ThreadPoolExecutor(1) as threads:
        ending = threads.submit(end_workers, database, 2, signal.SIGSEGV)
        result = executor.execute(database, HANG)
        ending.result()
    assert result.status == "limit"
    assert executor.stats()["crashes"] == 2
    assert executor.execute(database, "SELECT 7").rows == ((7,),)


def test_a_statement_whose_workers_are_always_killed_from_outside_is_our_fault(executor, database):
    executor.execute(database, "SELECT 1")
    with ThreadPoolExecutor(1) as threads:
        ending = threads.submit(end_workers, database, MAX_KILLS, signal.SIGKILL)
        result = executor.execute(database, HANG)
        ending.result()
    assert result.status == "infra"
    assert "lower the executor's num_workers or memory_mb" in result.error
    assert executor.execute(database, "SELECT 7").rows == ((7,),)


@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGTERM])
def test_a_statement_outlives_workers_that_are_killed_from_outside(executor, database, with_signal):
    executor.execute(database, "SELECT 1")
    with ThreadPoolExecutor(1) as threads:
        ending = threads.submit(end_workers, database, 2, with_signal)
        result = executor.execute(database, HANG)  # would be a limit, were it held to have crashed them
        ending.result()
    assert result.status == "timeout"
    assert (executor.stats()["crashes"], executor.stats()["kills"]) == (2, 1)


@pytest.mark.parametrize("program", ["/nowhere/python", "/bin/true"])
def test_a_worker_that_does_not_start_is_our_fault(executor, database, monkeypatch, program):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", program)
        result = executor.execute(database, "SELECT 1")
    assert result.status == "infra"
    assert "nowhere" not in result.error
    assert executor.execute(database, "SELECT 7").rows == ((7,),)


def test_many_threads_get_each_their_own_answer_from_few_workers(database):
    with closing(SQLiteExecutor(num_workers=2)) as executor, ThreadPoolExecutor(8) as threads:
        statements = [f"SELECT {number}, name FROM pet WHERE id = {number % 3 + 1}" for number in range(200)]
        results = list(threads.map(lambda sql: executor.execute(database, sql), statements))
        assert len(children()) == 2
    names = ("Ada", "Bo", "Cleo")
    assert [result.rows for result in results] == [((number, names[number % 3]),) for number in range(200)]


def test_who_comes_first_is_served_first(executor, database):
    served = []

    def ask(number):
        executor.execute(database, COUNT_TO.format(f"WHERE x < {100_000 + number}"))
        served.append(number)

    threads = [threading.Thread(target=executor.execute, args=(database, ENDLESS))]
    threads += [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    for number, thread in enumerate(threads):
        thread.start()
        wait_until(lambda number=number: len(executor._live.pool._waiting) == number)
    for thread in threads:
        thread.join()
    assert served == [0, 1, 2, 3, 4]


def test_settings_and_their_copies_start_no_process(database):
    executor = SQLiteExecutor(3, 4.0, 5, 60, 700, 800, 9)
    copies = [copy.copy(executor), copy.deepcopy(executor), pickle.loads(pickle.dumps(executor))]
    assert children() == []
    with closing(executor):
        assert executor.execute(database, "SELECT 7").rows == ((7,),)
        copies.append(copy.copy(executor))
        assert len(children()) == 1
        assert {repr(each) for each in copies} == {
            "SQLiteExecutor(num_workers=3, timeout_seconds=4.0, max_rows=5, max_bytes=60, max_sql_chars=700, "
            "memory_mb=800, cache_mb=9)"
        }
        copies[-1].close()
        assert len(children()) == 1


@pytest.mark.parametrize(
    "setting",
    [
        *({"num_workers": 0}, {"max_rows": 0}, {"max_bytes": -1}, {"max_sql_chars": 0}, {"memory_mb": 63}),
        {"cache_mb": -1},
        *({"timeout_seconds": 0.0}, {"timeout_seconds": math.inf}, {"timeout_seconds": math.nan}),
    ],
)
def test_a_setting_that_can_never_work_is_refused_by_name_and_value(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError, match=f"{name}={value} "):
        SQLiteExecutor(**setting)


def test_memory_that_no_worker_of_duckdb_starts_in_is_refused_too():
    with pytest.raises(ConfigError, match="memory_mb=255 is too little to start in; use 256 or more"):
        DuckDBExecutor(memory_mb=255)
    assert DuckDBExecutor().memory_mb == 1024


def test_the_least_memory_is_enough(database):
    animals = database.with_name("animals.duckdb")
    with closing(duckdb.connect(animals)) as connection:
        connection.execute("CREATE TABLE pet AS SELECT 7 AS id")
    for path, least in ((database, SQLiteExecutor(memory_mb=64)), (animals, DuckDBExecutor(memory_mb=256))):
        with closing(least):
            assert least.execute(path, "SELECT count(*) FROM pet").status == "ok"


def test_close_ends_all_processes_and_a_later_statement_starts_new_ones(database):
    executor = SQLiteExecutor(num_workers=2)
    executor.close()
    with ThreadPoolExecutor(2) as threads:
        statements = [COUNT_TO.format(f"WHERE x < {number}") for number in (200_000, 200_001)]
        list(threads.map(lambda sql: executor.execute(database, sql), statements))
    assert len(children()) == 2
    executor.close()
    executor.close()
    assert children() == []
    assert executor.execute(database, "SELECT 7").rows == ((7,),)
    executor.close()
    assert children() == []


def test_close_ends_what_runs_and_what_waits_and_both_are_told(executor, database):
    statements = [ENDLESS, ENDLESS, f"{ENDLESS} -- other", f"{ENDLESS} -- third"]  # two of them run once
    with ThreadPoolExecutor(4) as threads:
        results = [threads.submit(executor.execute, database, sql) for sql in statements]
        wait_until(children)
        time.sleep(0.2)
        executor.close()
        assert children() == []
        assert [result.result().status for result in results] == ["infra"] * 4
    assert children() == []


def test_workers_end_with_the_object_that_nobody_holds_any_more(database):
    executor = SQLiteExecutor()
    executor.execute(database, "SELECT 1")
    assert len(children()) == 1
    del executor
    gc.collect()
    assert children() == []


def test_a_forked_process_has_workers_of_its_own_and_leaves_ours_alone(executor, database):
    executor.execute(database, "SELECT 1")
    before = children()
    with executor._live.pool._lock:  # as if another thread, which the child does not have, held it just now
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            executor.close()
            right = executor.execute(database, "SELECT 22").rows == ((22,),)
            num_workers = len(children())
            executor.close()
            os._exit(0 if right and num_workers == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert executor.execute(database, "SELECT 33").rows == ((33,),)
    assert children() == before


@pytest.mark.parametrize("sql", ["SELECT 1", ENDLESS, HANG])
def test_no_worker_outlives_a_parent_that_is_killed(database, sql):
    program = """
        import sys, threading, time
        from pathlib import Path
        from lit_stepwise.text2sql.executors import SQLiteExecutor
        executor = SQLiteExecutor(num_workers=2, timeout_seconds=0.5)
        executor.execute(Path(sys.argv[1]), "SELECT 1")
        threading.Thread(target=executor.execute, args=(Path(sys.argv[1]), sys.argv[2])).start()
        print("running", flush=True)
        time.sleep(60)
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(program), str(database), sql]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout.readline() == b"running\n"
        time.sleep(0.1)
        workers = children(parent.pid)
        assert len(workers) == 1
        parent.kill()
    wait_until(lambda: not any(map(is_running, workers)))


def test_workers_end_at_the_normal_end_of_the_program(database):
    program = """
        import sys
        from pathlib import Path
        from lit_stepwise.text2sql.executors import SQLiteExecutor
        executor = SQLiteExecutor()
        assert executor.execute(Path(sys.argv[1]), "SELECT 1").status == "ok"
        print(*[worker._process.pid for worker in executor._live.pool._alive])
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), str(database)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert ended.stderr == ""
    assert not is_running(int(ended.stdout))


def test_a_file_of_the_other_system_is_told_with_the_executor_that_reads_it(executor, database):
    animals = database.with_name("animals.db")
    with closing(duckdb.connect(animals)) as connection:
        connection.execute("CREATE TABLE animal AS SELECT 7 AS id")
    says = "animals.db is a DuckDB database; set rollout.environment.executor: DuckDBExecutor"
    assert (executor.execute(animals, "SELECT 1").status, executor.execute(animals, "SELECT 1").error) == (
        "infra",
        says,
    )
    with closing(DuckDBExecutor(num_workers=1)) as other:
        assert other.execute(animals, "SELECT id FROM animal").rows == ((7,),)
        result = other.execute(database, "SELECT 1")
    says = "pets.sqlite is a SQLite database; set rollout.environment.executor: SQLiteExecutor"
    assert (result.status, result.error) == ("infra", says)


def test_one_statement_asked_twice_runs_once(executor, database):
    first = executor.execute(database, "SELECT name FROM pet")
    assert executor.execute(database, "SELECT name FROM pet") is first
    assert executor.stats()["cache_hits"] == 1
    assert executor.stats()["statements"] == executor.stats()["ok"] == 2


@pytest.mark.parametrize(
    ("sql", "again", "hits"),
    [
        ("SELECT 1+1", " \n\tSELECT 1+1 ; ;\r\n", 1),
        ("SELECT 1+1", "SELECT  1+1", 0),  # no other change: columns are named after the text
        ("SELECT 1+1", "select 1+1", 0),
        ("SELECT 1+1", "SELECT 1+1 -- same", 0),
        ("SELECT 1+1", "SELECT 1+1\xa0", 0),  # which is no blank in SQL
        ("SELECT nope", "SELECT nope", 1),
        ("DROP TABLE pet", "DROP TABLE pet", 1),
        ("SELECT date('now')", "SELECT date('now')", 0),
        ("SELECT zeroblob(900000000)", "SELECT zeroblob(900000000)", 0),
    ],
)
def test_what_is_remembered_and_what_is_not(executor, database, sql, again, hits):
    first, second = executor.execute(database, sql), executor.execute(database, again)
    assert executor.stats()["cache_hits"] == hits
    assert not hits or second is first


STATEMENTS_OF_ALL_KINDS = [
    *("SELECT * FROM pet ORDER BY id", "SELECT id FROM pet LIMIT 0", "SELECT x'00ff', 0.1, 'ü', NULL, 9e999"),
    *(
        "SELECT weight * 2 FROM pet;",
        " SELECT 1 ;; ",
        "SELECT ';",
        ";",
        "",
        "SELECT 1 -- ;",
        "SELECT 1 /* ;",
        "SELECT 1 +;",
    ),
    *(
        "SELECT 1 +;",
        "SELECT nope",
        "DROP TABLE pet",
        "SELECT random()",
        "SELECT * FROM pet, pet, pet, pet",
        "SELECT '\ud800'",
    ),
]


def test_a_remembered_answer_is_exactly_the_fresh_one(executor, database):
    with closing(SQLiteExecutor(num_workers=1, cache_mb=0)) as fresh:
        for sql in STATEMENTS_OF_ALL_KINDS * 2:
            expected, found = fresh.execute(database, sql), executor.execute(database, sql)
            assert repr(replace(found, seconds=0.0)) == repr(replace(expected, seconds=0.0))
        assert fresh.stats()["cache_hits"] == 0
    assert executor.stats()["cache_hits"] >= len(STATEMENTS_OF_ALL_KINDS)


def test_results_belong_to_the_contents_of_a_file(executor, database):
    sql = "SELECT name FROM pet WHERE id = 1"
    copied = database.parent / "copies" / database.name
    copied.parent.mkdir()
    shutil.copy(database, copied)
    assert executor.execute(database, sql) is executor.execute(copied, sql)
    with closing(sqlite3.connect(copied)) as connection, connection:
        connection.execute("UPDATE pet SET name = 'Ida' WHERE id = 1")
    assert executor.execute(copied, sql).rows == (("Ida",),)
    assert executor.execute(database, sql).rows == (("Ada",),)
    os.replace(copied, database)
    assert executor.execute(database, sql).rows == (("Ida",),)


def test_a_journal_is_seen_though_the_result_is_known(executor, database):
    assert executor.execute(database, "SELECT 7").status == "ok"
    Path(f"{database}-wal").write_bytes(b"x")
    assert executor.execute(database, "SELECT 7").status == "infra"


def test_results_of_a_file_that_changes_while_a_statement_runs_are_not_remembered(database):
    sql, contents = COUNT_TO.format("WHERE x < 2000000"), database.read_bytes()
    with closing(SQLiteExecutor(num_workers=1, timeout_seconds=30)) as executor, ThreadPoolExecutor(1) as threads:
        executor.execute(database, "SELECT 1")
        running = threads.submit(executor.execute, database, sql)
        time.sleep(0.1)
        database.write_bytes(contents + bytes(4096))
        assert running.result().status == "ok"
        database.write_bytes(contents)
        assert executor.execute(database, sql).status == "ok"
        assert executor.stats()["cache_hits"] == 0


def test_a_whole_group_that_asks_the_same_at_once_runs_it_once(database):
    sql = COUNT_TO.format("WHERE x < 500000")
    with closing(SQLiteExecutor(num_workers=2)) as executor, ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda _: executor.execute(database, sql), range(8)))
        assert {result.rows for result in results} == {((500_000,),)}
        assert (executor.stats()["cache_hits"], executor.stats()["starts"]) == (7, 1)


def test_results_are_forgotten_with_close(executor, database):
    executor.execute(database, "SELECT 7")
    executor.close()
    executor.execute(database, "SELECT 7")
    assert executor.stats()["cache_hits"] == 0
    assert executor.stats()["starts"] == 2


def test_statistics_have_their_names_from_the_start_and_count_every_statement(executor, database):
    start = executor.stats()
    assert set(start) == {
        *("statements", "cache_hits", "ok", "error", "denied", "timeout", "limit", "infra"),
        *("kills", "crashes", "starts", "queue_seconds", "run_seconds"),
    }
    assert set(start.values()) == {0}
    statements = ["SELECT 1", "SELECT 1", "SELECT 1", "SELECT 2", "SELECT nope", "DROP TABLE pet", None, HANG]
    for sql in statements:
        executor.execute(database, sql)
    executor.execute(database, "x" * 20_001)
    executor.execute(database.with_name("none.sqlite"), "SELECT 1")
    end = dict(executor.stats())
    assert 1.5 <= end.pop("run_seconds") < 9
    assert 0 < end.pop("queue_seconds") < 1
    assert end == {
        **{"statements": 10, "ok": 4, "cache_hits": 2, "error": 2, "denied": 1, "timeout": 1, "limit": 1, "infra": 1},
        **{"kills": 1, "crashes": 0, "starts": 2},
    }


def test_the_time_in_the_queue_is_counted_in_threads_and_in_coroutines(database):
    with closing(SQLiteExecutor(num_workers=1, timeout_seconds=0.4)) as executor, ThreadPoolExecutor(2) as threads:
        began = time.monotonic()
        list(threads.map(lambda number: executor.execute(database, f"{ENDLESS} -- {number}"), range(2)))
        in_threads = executor.stats()["queue_seconds"]
        # one of them waits, and then runs for 0.4 s itself
        assert 0.3 < in_threads < time.monotonic() - began - 0.3

        async def ask():
            await asyncio.gather(*(executor.aexecute(database, f"{ENDLESS} -- {number}") for number in range(2)))

        began = time.monotonic()
        asyncio.run(ask())
        assert 0.3 < executor.stats()["queue_seconds"] - in_threads < time.monotonic() - began - 0.3


def test_an_event_loop_goes_on_while_statements_run(executor, database):
    async def play():
        running = asyncio.gather(*(executor.aexecute(database, f"{ENDLESS} -- {number}") for number in range(2)))
        delays = []
        while not running.done():
            start = time.monotonic()
            await asyncio.sleep(0.01)
            delays.append(time.monotonic() - start)
        return await running, delays

    results, delays = asyncio.run(play())
    assert [result.status for result in results] == ["timeout", "timeout"]
    assert len(delays) > 20  # in the two seconds that both took
    assert max(delays) < 0.9


def test_coroutines_get_each_their_own_answer_from_few_threads(database):
    async def play():
        statements = [f"SELECT {number}" for number in range(50)]
        return await asyncio.gather(*(executor.aexecute(database, sql) for sql in statements))

    before = threading.active_count()
    with closing(SQLiteExecutor(num_workers=2)) as executor:
        assert [result.rows for result in asyncio.run(play())] == [((number,),) for number in range(50)]
        assert threading.active_count() <= before + 2
        assert len(children()) <= 2
    wait_until(lambda: threading.active_count() == before)


def test_an_awaiter_that_gives_up_is_not_held_up_and_its_statement_harms_nobody(executor, database):
    async def play():
        start = time.monotonic()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(executor.aexecute(database, HANG), 0.1)
        cancelled = [asyncio.ensure_future(executor.aexecute(database, HANG)) for _ in range(3)]
        await asyncio.sleep(0.01)
        for task in cancelled:
            task.cancel()
        await asyncio.wait(cancelled)
        return time.monotonic() - start, await executor.aexecute(database, "SELECT 7")

    seconds, result = asyncio.run(play())
    assert seconds < 1.4  # the first is killed after 1.5
    assert result.rows == ((7,),)
    assert executor.stats()["statements"] == 2  # those that were cancelled in the queue never ran


def test_close_tells_awaiters_too_and_a_later_statement_starts_anew(executor, database):
    async def play():
        running = [asyncio.ensure_future(executor.aexecute(database, f"{ENDLESS} -- {number}")) for number in range(3)]
        await asyncio.sleep(0.2)
        executor.close()
        results = await asyncio.gather(*running)
        assert children() == []
        return results, await executor.aexecute(database, "SELECT 7")

    results, later = asyncio.run(play())
    assert [(result.status, result.error) for result in results] == [("infra", "the executor was closed")] * 3
    assert later.rows == ((7,),)
    assert (executor.stats()["crashes"], executor.stats()["kills"]) == (0, 0)


def test_random_kills_cost_no_statement_its_right_answer(database):
    num_files = len(os.listdir("/proc/self/fd"))
    stop = threading.Event()

    def kill_at_random():
        """The older worker each time, and none before others have answered: no statement is given up for bad luck."""
        chance, num_kills, goal = random.Random(0), 0, 3
        while not stop.wait(chance.uniform(0, 0.02)):
            if executor.stats()["ok"] >= goal and (workers := list(filter(is_running, children()))):
                with suppress(ProcessLookupError):
                    os.kill(min(workers), signal.SIGKILL)
                    num_kills += 1
                goal = executor.stats()["ok"] + chance.randint(3, 12)
        return num_kills

    def ask(number):
        return executor.execute(database, COUNT_TO.format(f"WHERE x < {60_000 + number}"))

    executor = SQLiteExecutor(num_workers=2)
    with closing(executor), ThreadPoolExecutor(9) as threads:
        killing = threads.submit(kill_at_random)
        results = list(threads.map(ask, range(300)))
        stop.set()
        num_kills = killing.result()
        assert len(children()) <= 2
    assert [(result.status, result.rows) for result in results] == [
        ("ok", ((60_000 + number,),)) for number in range(300)
    ]
    stats = executor.stats()
    assert (stats["ok"], stats["statements"], stats["kills"]) == (300, 300, 0)
    assert num_kills >= 5
    assert num_kills - 2 <= stats["crashes"] <= num_kills
    assert children() == []
    assert len(os.listdir("/proc/self/fd")) == num_files
