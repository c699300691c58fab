import copy
import gc
import json
import math
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from lit_stepwise.errors import ConfigError
from lit_stepwise.text2sql import sqlite_worker
from lit_stepwise.text2sql.executors import SQLiteExecutor

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
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


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


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
    assert 1.0 <= result.seconds < 1.5
    assert executor.execute(database, "SELECT 7").rows == ((7,),)
    assert children() == before


def test_a_hang_that_cannot_be_interrupted_is_killed_and_the_worker_replaced(executor, database):
    executor.execute(database, "SELECT 1")
    before = children()
    result = executor.execute(database, HANG)
    assert result.status == "timeout"
    assert 1.5 <= result.seconds < 2.5
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
        list(threads.map(lambda _: executor.execute(database, ENDLESS), range(2)))
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
    assert limits["Max open files"] == ["32", "32"]
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    assert Path(f"/proc/{pid}/environ").read_bytes() == b""


def test_a_connection_only_reads_even_if_its_guard_let_everything_pass(database):
    before = snapshot(database.parent)
    with closing(sqlite_worker.open_database(database, lambda *_: sqlite3.SQLITE_OK, lambda: False)) as connection:
        settings = ("query_only", "trusted_schema", "temp_store", "cell_size_check")
        assert [connection.execute(f"PRAGMA {name}").fetchone() for name in settings] == [(1,), (0,), (2,), (1,)]
        connection.execute("PRAGMA query_only = 0")
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            connection.execute("DELETE FROM pet")
        with pytest.raises(sqlite3.OperationalError, match="too many attached"):
            connection.execute(f"ATTACH '{database.parent}/planted.sqlite' AS p")
    assert snapshot(database.parent) == before


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


def test_a_statement_that_kills_two_workers_is_a_limit(executor, database):
    executor.execute(database, "SELECT 1")
    killed = set()

    def kill_two():
        while len(killed) < 2:
            for pid in set(children()) - killed:
                time.sleep(0.3)
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)

    with ThreadPoolExecutor(1) as threads:
        killing = threads.submit(kill_two)
        result = executor.execute(database, HANG)
        killing.result()
    assert result.status == "limit"
    assert executor.execute(database, "SELECT 7").rows == ((7,),)


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
        executor.execute(database, f"SELECT {number}")
        served.append(number)

    threads = [threading.Thread(target=executor.execute, args=(database, ENDLESS))]
    threads += [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert served == [0, 1, 2, 3, 4]


def test_settings_and_their_copies_start_no_process(database):
    executor = SQLiteExecutor(3, 4.0, 5, 60, 700, 800)
    copies = [copy.copy(executor), copy.deepcopy(executor), pickle.loads(pickle.dumps(executor))]
    assert children() == []
    with closing(executor):
        assert executor.execute(database, "SELECT 7").rows == ((7,),)
        copies.append(copy.copy(executor))
        assert len(children()) == 1
        assert {repr(each) for each in copies} == {
            "SQLiteExecutor(num_workers=3, timeout_seconds=4.0, max_rows=5, max_bytes=60, max_sql_chars=700, "
            "memory_mb=800)"
        }
        copies[-1].close()
        assert len(children()) == 1


@pytest.mark.parametrize(
    "setting",
    [
        *({"num_workers": 0}, {"max_rows": 0}, {"max_bytes": -1}, {"max_sql_chars": 0}, {"memory_mb": 63}),
        *({"timeout_seconds": 0.0}, {"timeout_seconds": math.inf}, {"timeout_seconds": math.nan}),
    ],
)
def test_a_setting_that_can_never_work_is_refused_by_name_and_value(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError, match=f"{name}={value} "):
        SQLiteExecutor(**setting)


def test_close_ends_all_processes_and_a_later_statement_starts_new_ones(database):
    executor = SQLiteExecutor(num_workers=2)
    executor.close()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: executor.execute(database, COUNT_TO.format("WHERE x < 200000")), range(2)))
    assert len(children()) == 2
    executor.close()
    executor.close()
    assert children() == []
    assert executor.execute(database, "SELECT 7").rows == ((7,),)
    executor.close()
    assert children() == []


def test_close_ends_what_runs_and_what_waits_and_both_are_told(executor, database):
    with ThreadPoolExecutor(4) as threads:
        results = [threads.submit(executor.execute, database, ENDLESS) for _ in range(4)]
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
    with executor._pool._lock:  # as if another thread, which the child does not have, held it just now
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
    wait_until(lambda: not any(map(is_running, workers)), seconds=4.0)


def test_workers_end_at_the_normal_end_of_the_program(database):
    program = """
        import sys
        from pathlib import Path
        from lit_stepwise.text2sql.executors import SQLiteExecutor
        executor = SQLiteExecutor()
        assert executor.execute(Path(sys.argv[1]), "SELECT 1").status == "ok"
        print(*[worker._process.pid for worker in executor._pool._alive])
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), str(database)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert ended.stderr == ""
    assert not is_running(int(ended.stdout))


@pytest.mark.skipif(not (SHARED / "hostile_sql.jsonl").exists(), reason="the shared data is not here")
def test_every_hostile_statement_ends_as_it_must_and_leaves_no_trace(executor, tmp_path):
    databases, out = tmp_path / "databases", tmp_path / "out"
    shutil.copytree(SHARED / "text2sql" / "databases" / "world_1", databases / "world_1")
    out.mkdir()
    world = databases / "world_1" / "world_1.sqlite"
    before = snapshot(tmp_path)
    places = {"{DB_DIR}": str(databases), "{OUT_DIR}": str(out), "{ROOT}": str(tmp_path)}

    def fill(text):
        for name, place in places.items():
            text = text and text.replace(name, place)
        return text

    cases = map(json.loads, (SHARED / "hostile_sql.jsonl").read_text().splitlines())
    for case in (case for case in cases if case["engine"] in ("sqlite", "both")):
        result = executor.execute(world, fill(case["sql"]))
        shown = f"{result.columns} {result.rows} {result.error}"
        assert result.status in case["must"], case["name"]
        assert not any(fill(text) in shown for text in (*case.get("not_in", ()), "{ROOT}")), case["name"]
        assert result.truncated or result.status != "ok" or not case.get("must_truncate"), case["name"]
        assert executor.execute(world, "SELECT count(*) FROM city").rows == ((4079,),), case["name"]
    assert snapshot(tmp_path) == before
