import getpass
import hashlib
import json
import os
import shutil
import socket
import sqlite3
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import duckdb
import pytest

from lit_stepwise.sandbox import duckdb_worker
from lit_stepwise.sandbox.duckdb_guard import TABLE_FUNCTIONS, VIEWS, Denied, Guard
from lit_stepwise.sandbox.duckdb_worker import DuckDBSystem
from lit_stepwise.sandbox.framing import HEADER, unpack
from lit_stepwise.sandbox.pool import WorkerPool
from lit_stepwise.sandbox.worker import Request, answer

pytestmark = pytest.mark.clock

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
ENDLESS = "SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b"
HANG = "SELECT jaro_similarity(repeat('ab', 4000000), repeat('ba', 4000000))"  # one long call; nothing interrupts it
BOMB = "SELECT length(string_agg(repeat('x', 1000000), '')) FROM range({})"


@pytest.fixture(scope="module")
def system():
    system = DuckDBSystem(1024)
    yield system
    system.close()


@pytest.fixture
def ask(system):
    """Run one statement in this process."""

    def ask(database, sql, seconds=5.0, max_rows=5000, max_bytes=4_000_000):
        parts = []
        request = Request(str(database), sql, time.monotonic() + seconds, max_rows, max_bytes)
        last = answer(system, request, parts.append)
        parts = [unpack(part[HEADER.size :]) for part in parts]
        rows = [tuple(row) for part in (*parts, last.get("rows", ())) for row in part]
        return SimpleNamespace(**{"columns": [], "truncated": False, "error": "", **last, "rows": rows})

    return ask


@pytest.fixture
def pool():
    """The program as it runs for an executor."""
    pool = WorkerPool(1, ("-I", "-X", "utf8", duckdb_worker.__file__, "1024"), "DuckDB")
    yield pool
    pool.close()


def run(pool, database, sql, seconds=1.0):
    request = {
        "database": str(database),
        "sql": sql,
        "timeout_seconds": seconds,
        "max_rows": 5000,
        "max_bytes": 4_000_000,
    }
    return pool.run(request, pool.num_closes)[0]


def make(path, *statements):
    path.parent.mkdir(parents=True, exist_ok=True)
    with duckdb.connect(str(path)) as connection:
        for statement in statements:
            connection.execute(statement)
    return path


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return make(
        tmp_path_factory.mktemp("all") / "my pets #1" / "pets.duckdb",
        "CREATE TABLE pet (id INTEGER PRIMARY KEY, name VARCHAR, weight DOUBLE, uuid VARCHAR DEFAULT 'none')",
        "INSERT INTO pet VALUES (1, 'Ada', 3.5, 'x'), (2, 'Bo', 41.25, 'y'), (3, 'Cleo', NULL, 'z')",
        "CREATE SEQUENCE numbers",
        'CREATE VIEW "seen AS is" AS SELECT uuid, name FROM pet WHERE id < 3',
        "CREATE VIEW drawn AS SELECT random() AS x",
        "CREATE VIEW OverDrawn (y) AS SELECT x FROM drawn",
        "CREATE VIEW places AS SELECT path FROM duckdb_databases()",
        "CREATE MACRO twice(x) AS x * 2, (x, y) AS x * 2 + y",
        "CREATE MACRO chance(x) AS random(), (x, y) AS x",
        "CREATE MACRO more_chance(x) AS chance(x)",
        "CREATE MACRO pets_above(w) AS TABLE SELECT name FROM pet WHERE weight > w",
        "CREATE MACRO settings(x) AS TABLE SELECT * FROM duckdb_settings()",
        'CREATE MACRO json_serialize_sql(x) AS \'{"error": false, "statements": [{}]}\'',
    )


@pytest.fixture
def copied(tmp_path, database):
    """A database that a test may have for itself."""
    path = tmp_path / "my pets #1" / "pets.duckdb"
    path.parent.mkdir()
    return Path(shutil.copy(database, path))


def snapshot(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns) for path in files]


def test_a_result_has_columns_and_rows_in_order(ask, database):
    result = ask(database, "SELECT name, weight AS kg FROM pet ORDER BY id DESC")
    assert (result.status, result.error, result.truncated) == ("ok", "", False)
    assert result.columns == ["name", "kg"]
    assert result.rows == [("Cleo", None), ("Bo", 41.25), ("Ada", 3.5)]


def test_every_kind_of_value_comes_back_exactly(pool, database):
    sql = (
        "SELECT 9223372036854775807, -170141183460469231731687303715884105727, 340282366920938463463374607431768211455,"
        " 9007199254740993::DECIMAL(38, 0), 1.25, 2.50::DECIMAL(4, 2), 3::DECIMAL(4, 2), 0.1::DOUBLE,"
        " 'inf'::DOUBLE, '-inf'::DOUBLE,"
        " '-0'::DOUBLE, 0.5::FLOAT, true, NULL, 'ü' || chr(10) || '€𝄞', '', 'a'::ENUM('b', 'a'), '\\x00\\xFF'::BLOB"
    )
    values = [
        2**63 - 1,
        -(2**127) + 1,
        2**128 - 1,
        2**53 + 1,
        1.25,
        2.5,
        3.0,
        0.1,
        float("inf"),
        float("-inf"),
        -0.0,
        0.5,
    ]
    values += [True, None, "ü\n€𝄞", "", "a", b"\x00\xff"]
    (row,) = run(pool, database, sql).rows
    assert list(map(repr, row)) == list(map(repr, values))


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        ("DATE '2024-01-31'", "2024-01-31"),
        ("DATE '0044-03-15 (BC)'", "0044-03-15 (BC)"),
        ("TIMESTAMP '2024-01-31 10:00:00'", "2024-01-31 10:00:00"),
        ("TIMESTAMP '2024-01-31 10:00:00.120'", "2024-01-31 10:00:00.12"),
        ("TIMESTAMPTZ '2024-01-31 10:00:00+02'", "2024-01-31 08:00:00+00"),
        ("TIMESTAMP_NS '2024-01-31 10:00:00.123456789'", "2024-01-31 10:00:00.123456789"),
        ("TIME '10:05:00'", "10:05:00"),
        ("INTERVAL 14 MONTH", "1 year 2 months"),
        ("'0190a5a0-0000-7000-8000-00000000000a'::UUID", "0190a5a0-0000-7000-8000-00000000000a"),
        ("'0101'::BIT", "0101"),
        ("[1, NULL, 3]", "[1, NULL, 3]"),
        ("[1, 2]::INTEGER[2]", "[1, 2]"),
        ("{'b': 1, 'a': 'x'}", "{'b': 1, 'a': x}"),
        ("MAP {'z': 1, 'a': 2}", "{z=1, a=2}"),
        ("union_value(k := 7)", "7"),
        ("NULL::INTEGER[]", None),
    ],
)
def test_a_value_that_python_lacks_is_text_as_duckdb_shows_it(ask, database, sql, text):
    result = ask(database, f"SELECT 1 AS a, {sql} AS a, 'it''s' AS \"b c\" ; -- done")
    assert (result.columns, result.rows) == (["a", "a", "b c"], [(1, text, "it's")])


def test_the_order_of_rows_survives_where_values_become_text(ask, database):
    result = ask(database, "SELECT [id] FROM pet, range(1000) ORDER BY weight DESC NULLS LAST, id")
    assert [row for (row,) in result.rows] == ["[2]"] * 1000 + ["[1]"] * 1000 + ["[3]"] * 1000


@pytest.mark.parametrize(
    "sql",
    [
        "WITH x AS (SELECT max(weight) AS w FROM pet) SELECT w FROM x;  -- done",
        "FROM pet SELECT count(*)",
        "VALUES (1)",
        "SELECT uuid FROM pet",
        "SELECT random FROM (SELECT 1 AS random) AS uuid",
        "SELECT 'read_text(1)', 'SET x = 1; DROP TABLE pet'",
        "PIVOT pet ON id IN (1, 2) USING sum(weight)",
        "SELECT list_transform([1, 2], lambda x: x + 1), unnest([1, 2])",
        "SELECT * FROM generate_series(1, 3)",
        "SELECT now() IS NOT NULL, current_date IS NOT NULL, current_schema()",
        "SELECT histogram(weight) FROM pet",
        "EXPLAIN SELECT * FROM pet",
        "/* why */ explain -- how\n SELECT * FROM pet;",
        "DESCRIBE pet",
        "DESCRIBE SELECT 1 AS x",
        "DESCRIBE",
        "SUMMARIZE pet",
        "SHOW TABLES",
        "SHOW ALL TABLES",
        "SHOW TABLES FROM main",
        "PRAGMA table_info('pet')",
        "pragma table_info(pet);",
        "PRAGMA show_tables",
        "SELECT * FROM pragma_table_info('pet')",
        "SELECT table_name, sql FROM duckdb_tables()",
        "SELECT column_name FROM information_schema.columns WHERE table_name = 'pet'",
        "SELECT sql FROM sqlite_master",
    ],
)
def test_reading_is_allowed_in_every_form_and_gives_the_same_twice(ask, database, sql):
    first, second = ask(database, sql), ask(database, sql)
    assert (first.status, first.error) == ("ok", "")
    assert first.rows
    assert first == second
    assert str(database.parent) not in str(first.rows)


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO pet VALUES (4, 'Dot', 1, 'w')",
        "UPDATE pet SET name = 'x' RETURNING id",
        "MERGE INTO pet USING pet AS p ON pet.id = p.id WHEN MATCHED THEN DELETE",
        "DROP TABLE pet",
        "CREATE TEMP TABLE t AS SELECT 1",
        "CREATE OR REPLACE TEMP MACRO name(x) AS 1",
        "EXPLAIN DELETE FROM pet",
        "EXPLAIN ANALYZE DELETE FROM pet",
        "EXPLAIN ANALYZE SELECT 1",
        "EXPLAIN (FORMAT json) COPY pet TO '{folder}/planted.csv'",
        "EXPLAIN SELECT current_setting('home_directory')",
        "/**/ SET VARIABLE x = 1 -- */ PRAGMA show_tables",
        "/* /* */ EXPLAIN SELECT 1 */ PRAGMA database_list",
        "-- x\r PRAGMA database_list /* \nEXPLAIN SELECT 1 -- */",
        "ATTACH '{folder}/planted.duckdb' AS p",
        "ATTACH '{database}' AS p",
        "DETACH pets",
        "USE memory",
        "COPY pet TO '{folder}/planted.csv'",
        "COPY pet FROM '{folder}/planted.csv'",
        "EXPORT DATABASE '{folder}/planted'",
        "IMPORT DATABASE '{folder}'",
        "INSTALL httpfs",
        "LOAD '{folder}/evil.duckdb_extension'",
        "CHECKPOINT",
        "VACUUM",
        "ANALYZE",
        "BEGIN",
        "SET threads = 64",
        "RESET threads",
        "SET VARIABLE x = 1",
        "PREPARE p AS SELECT 1",
        "EXECUTE p",
        "CALL duckdb_settings()",
        "PRAGMA database_list",
        "PRAGMA threads = 64",
        "PRAGMA enable_profiling",
        "PRAGMA database_size",
        "SHOW DATABASES",
        "SELECT * FROM (SHOW DATABASES)",
        "FROM '{folder}/planted.csv'",
        "FROM 'https://example.org/x.csv'",
        "FROM 's3://bucket/x.parquet'",
        "SELECT * FROM pg_settings",
        'SELECT * FROM "Pragma_Database_List"',
        "SUMMARIZE duckdb_databases",
        "SELECT nextval('numbers')",
        "SELECT * FROM drawn",
        "SELECT * FROM main.overdrawn",
        "DESCRIBE places",
        "SELECT chance(1)",
        "SELECT more_chance(1)",
        "SELECT * FROM settings(1)",
        "SELECT * FROM pet USING SAMPLE 2",
        "SELECT * FROM (SELECT * FROM pet TABLESAMPLE 50%)",
    ],
)
def test_anything_but_reading_is_denied_and_changes_nothing(ask, database, sql):
    before = snapshot(database.parent)
    result = ask(database, sql.format(folder=database.parent, database=database))
    assert result.status == "denied"
    assert result.error.startswith("not allowed: ")
    assert str(database.parent) not in result.error
    assert snapshot(database.parent) == before
    assert ask(database, "SELECT count(*) FROM pet").rows == [(3,)]


@pytest.mark.parametrize(
    "sql",
    [
        *("SHOW threads", "SELECT * FROM (SHOW secret_directory)", "WITH x AS (DELETE FROM pet RETURNING id) FROM x"),
        *("SELECT 'x'.read_text()", 'SELECT system.main."Sleep_MS"(1)'),
    ],
)
def test_what_only_later_versions_parse_never_passes(ask, database, sql):
    assert ask(database, sql).status in ("denied", "error")
    assert ask(database, "SELECT count(*) FROM pet").rows == [(3,)]


@pytest.mark.parametrize(
    "sql",
    [
        *("", " \n", "-- nothing", ";", "SELEC 1", "SELECT nope FROM pet", "SELECT ?", "SELECT $x", "SELECT '\ud800'"),
        *("SELECT 1; SELECT 2", "SELECT 'x'::INTEGER", "FROM pets", "SELECT count(", "SELECT error('no')"),
        *(
            "PIVOT pet ON id USING sum(weight)",
            "SELECT 1 FROM",
            f"SELECT {'[' * 3000}1{']' * 3000}",
        ),
        *("SELECT * FROM 'no such'", "SELECT nope(1)", "FROM nope(1)"),
    ],
)
def test_a_wrong_statement_is_an_error_and_no_exception(ask, database, sql):
    result = ask(database, sql)
    assert result.status == "error"
    assert result.error


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        ("SELECT nam FROM pet", 'Candidate bindings: "name"'),
        ("FROM pett", 'Did you mean "pet'),
        ("SELECT lenght('x')", 'Did you mean "length"'),
        ("SELEC 1", "syntax error"),
        ("SELECT name::INTEGER FROM pet", "Could not convert"),
        ("SELECT 1; SELECT 2", "one statement at a time"),
        ("-- nothing", "write one SELECT statement"),
        ("PIVOT pet ON id USING sum(weight)", "ON column IN (value, ...)"),
        ("SELECT '\ud800'", "not valid text"),
        ("SELECT error('in {folder}/x y.csv')", "in <path>"),
        ("FROM '{database}x'", "does not exist"),
    ],
)
def test_an_error_helps_in_one_line_without_paths(ask, database, sql, text):
    error = ask(database, sql.format(folder=database.parent, database=database)).error
    assert text in error
    assert not any(part in error for part in ("\n", "LINE", "^", "/", "pets #1"))


@pytest.mark.parametrize(
    "call",
    [
        *("random()", '"Random"()', "main.random()", "system.main.RANDOM()", "random /* x */ (\n)", "abs(random())"),
        *("list_transform([1], lambda x: random())", "(SELECT random())", "CASE WHEN true THEN random() END"),
        *("sum(random()) OVER ()", "max(1) FILTER (WHERE random() > 2)", "first(1 ORDER BY random())"),
    ],
)
def test_a_function_is_recognised_however_it_is_called(ask, database, call):
    for sql in (
        f"SELECT {call}",
        f"WITH x AS (SELECT {call} AS y) SELECT 1",
        f"SELECT 1 UNION (SELECT {call} FROM pet)",
    ):
        assert ask(database, sql).error == "not allowed: function random"


@pytest.mark.parametrize(
    "call", ["glob('*')", "\"Glob\"('*')", "main.glob('*')", "system.main.glob('*')", "glob('*') g(x)"]
)
def test_a_table_function_is_recognised_wherever_it_stands(ask, database, call):
    for sql in (
        "FROM {}",
        "SELECT (SELECT count(*) FROM {})",
        "FROM pet, {}",
        "FROM pet JOIN {} ON true",
        "PIVOT {} ON 1",
    ):
        result = ask(database, sql.format(call))
        assert result.error == "not allowed: table function glob" or (sql[0] == "P" and result.status == "error")


@pytest.mark.parametrize("kind", ["table", "table_macro", "pragma"])
def test_every_function_that_gives_a_table_is_refused_unless_it_is_listed(ask, database, kind):
    names = duckdb.sql(
        f"SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_type = '{kind}'"
    ).fetchall()
    assert names
    for (name,) in names:
        for arguments in ("", "'pet'", f"'{database}'", "1, 2", "NULL::POINTER"):
            result = ask(database, f'SELECT * FROM "{name}"({arguments})', max_rows=50)
            listed = name in TABLE_FUNCTIONS
            assert result.status in (("ok", "error") if listed else ("denied", "error")), name
            assert listed or arguments == "NULL::POINTER" or result.status == "denied", name
            assert ask(database, f"SELECT * FROM {name.upper()}").status in ("denied", "error") or name in VIEWS


def test_a_statement_that_writes_within_a_select_is_refused_before_it_runs(system):
    catalog = SimpleNamespace(views={}, macros={})
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE pet (id INTEGER)")
        for sql in ("INSERT INTO pet VALUES (1)", "UPDATE pet SET id = 2", "DELETE FROM pet"):
            with pytest.raises((Denied, duckdb.NotImplementedException)):
                system._guard.check(connection, catalog, f"WITH x AS ({sql} RETURNING id) FROM x")


def test_functions_and_views_that_a_later_version_brings_are_refused_until_they_are_listed(ask, database):
    class Later:
        """Tells of one table function, one volatile function and one view that nobody has seen yet."""

        def execute(self, sql):
            functions = [
                ("brand_new", "table", None),
                ("surprise", "scalar", "VOLATILE"),
                ("calm", "scalar", "CONSISTENT"),
            ]
            return SimpleNamespace(fetchall=lambda: functions if "duckdb_functions" in sql else [("fresh_view",)])

    guard = Guard(Later())
    with duckdb.connect() as connection:
        catalog = SimpleNamespace(views={}, macros={})
        for sql in ("FROM brand_new()", "SELECT brand_new()", "SELECT surprise()", "FROM Fresh_View"):
            with pytest.raises(Denied):
                guard.check(connection, catalog, sql)
        assert guard.check(connection, catalog, "SELECT calm() FROM pet")


def test_no_function_and_no_view_tells_of_the_host(ask, database):
    rows = duckdb.sql("SELECT function_name FROM duckdb_functions() WHERE len(parameters) = 0").fetchall()
    views = duckdb.sql("SELECT schema_name || '.' || view_name FROM duckdb_views() WHERE internal").fetchall()
    settings = duckdb.sql("SELECT name FROM duckdb_settings()").fetchall()
    statements = [f'SELECT "{name}"()' for (name,) in rows] + [f"SELECT * FROM {name}" for (name,) in views]
    statements += [f"SHOW {name}" for (name,) in settings]
    secrets = [str(database.parent), str(Path.home()), socket.gethostname(), str(Path(sys.prefix))]
    secrets += [name for name in (getpass.getuser(),) if len(name) > 4 and name not in "duckdb"]
    passed = 0
    for sql in statements:
        result = ask(database, sql)
        assert result.status in ("ok", "denied", "error"), sql
        assert not any(secret in f"{result.rows}{result.error}" for secret in secrets), sql
        passed += result.status == "ok"
    assert passed > 40


def test_every_function_that_draws_or_acts_is_refused(ask, database):
    volatile = duckdb.sql(
        "SELECT DISTINCT function_name FROM duckdb_functions() WHERE stability = 'VOLATILE'"
    ).fetchall()
    names = {name for (name,) in volatile} - {"error", "stats"}
    assert {"random", "setseed", "nextval", "gen_random_uuid"} <= names
    internal = duckdb.sql(
        "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_name LIKE '\\_\\_int%' ESCAPE '\\'"
    )
    names |= {name for (name,) in internal.fetchall()}
    for name in names | {"current_setting", "getvariable", "json_serialize_plan", "reservoir_quantile", "txid_current"}:
        assert ask(database, f"SELECT {name}('x')").error == f"not allowed: function {name}"


@pytest.mark.parametrize(
    ("sql", "row"),
    [
        ('SELECT name FROM "seen AS is" ORDER BY 1 DESC', ("Bo",)),
        ("SELECT twice(21)", (42,)),
        ("SELECT twice(21, 1)", (43,)),
        ("SELECT * FROM pets_above(4)", ("Bo",)),
    ],
)
def test_what_a_database_defines_itself_may_be_used(ask, database, sql, row):
    assert ask(database, sql).rows[0] == row


def test_a_sample_with_a_seed_is_the_same_twice(ask, system, database):
    sql = "SELECT * FROM range(100000) TABLESAMPLE reservoir(5 ROWS) REPEATABLE (7)"
    first = ask(database, sql)
    assert first.status == "ok"
    assert len(first.rows) == 5
    system.close()
    assert ask(database, sql) == first


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('{folder}/secret.txt')",
        "SELECT * FROM read_blob('{database}')",
        "SELECT * FROM read_csv('{folder}/secret.txt')",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM query('SELECT * FROM read_text(''{folder}/secret.txt'')')",
        "COPY pet TO '{folder}/planted.csv'",
        "COPY (SELECT 1) TO '{folder}/planted.parquet'",
        "ATTACH '{folder}/planted.duckdb' AS p",
        "ATTACH '{folder}/other.duckdb' AS p",
        "INSTALL httpfs",
        "LOAD '{folder}/evil.duckdb_extension'",
        "INSERT INTO pet VALUES (4, 'Dot', 1, 'w')",
        "SELECT nextval('numbers')",
        "SET enable_external_access = true",
        "SET disabled_filesystems = ''",
        "SET lock_configuration = false",
        "SET GLOBAL threads = 64",
    ],
)
def test_a_database_only_reads_even_if_its_guard_let_everything_pass(ask, system, copied, monkeypatch, sql):
    make(copied.with_name("other.duckdb"), "CREATE TABLE t AS SELECT 1")
    copied.with_name("secret.txt").write_text("secret")
    before = snapshot(copied.parent)
    monkeypatch.setattr(system._guard, "check", lambda *_: False)
    result = ask(copied, sql.format(folder=copied.parent, database=copied))
    assert (result.status, result.rows) in (("denied", []), ("error", []))
    assert snapshot(copied.parent) == before


@pytest.mark.parametrize(
    ("leave", "look"),
    [
        ("CREATE TEMP TABLE left_over AS SELECT 1", "SELECT * FROM left_over"),
        ("CREATE TEMP MACRO left_over() AS 1", "SELECT left_over()"),
        ("PREPARE left_over AS SELECT 1", "EXECUTE left_over"),
        ("SET VARIABLE left_over = 1", "SELECT error('gone') WHERE getvariable('left_over') IS NULL"),
        ("BEGIN", "COMMIT"),
    ],
)
def test_nothing_is_left_of_a_statement_even_if_its_guard_let_everything_pass(
    ask, system, database, monkeypatch, leave, look
):
    monkeypatch.setattr(system._guard, "check", lambda *_: False)
    assert ask(database, leave).status == "ok"
    assert ask(database, look).status == "error"


def test_rows_beyond_the_cap_are_cut_and_said_so_without_making_them_all(ask, database):
    exact = ask(database, "SELECT id FROM pet ORDER BY id LIMIT 2", max_rows=2)
    more = ask(database, "SELECT id FROM pet ORDER BY id", max_rows=2)
    endless = ask(database, "SELECT * FROM range(1000000000000) a, range(1000000) b", max_rows=2)
    assert (exact.rows, exact.truncated) == ([(1,), (2,)], False)
    assert (more.rows, more.truncated) == ([(1,), (2,)], True)
    assert (endless.rows, endless.truncated) == ([(0, 0), (1, 0)], True)


def test_bytes_beyond_the_cap_are_cut_and_said_so(ask, database):
    # 8 + 2 bytes of text, 8 + 5 of a blob, 8 of the integer, 8 of the NULL: 39 in all, and 40 with a longer text
    values = "VALUES ('{}', '\\x01\\x02\\x03\\x04\\x05'::BLOB), (5::VARCHAR, NULL)"
    exact = ask(database, values.format("ü"), max_bytes=40)
    more = ask(database, values.format("üx"), max_bytes=40)
    assert (exact.rows, exact.truncated) == ([("ü", b"\1\2\3\4\5"), ("5", None)], False)
    assert (more.rows, more.truncated) == ([("üx", b"\1\2\3\4\5")], True)


def test_an_endless_statement_stops_at_its_deadline_and_leaves_no_thread(ask, system, database):
    num_threads = threading.active_count()
    start = time.monotonic()
    result = ask(database, ENDLESS, seconds=0.3)
    assert (result.status, result.error) == ("timeout", "the statement took too long")
    assert 0.3 <= time.monotonic() - start < 9
    assert threading.active_count() == num_threads
    assert not system._databases  # what was interrupted is not used again
    assert ask(database, "SELECT 7").rows == [(7,)]
    assert threading.active_count() == num_threads


def test_a_statement_that_ends_in_time_is_not_followed_by_an_interrupt(ask, database):
    assert ask(database, "SELECT 1", seconds=0.2).status == "ok"
    start = time.monotonic()
    assert ask(database, "SELECT sum(a.range) FROM range(1000000) a, range(100) b", seconds=60).status == "ok"
    assert time.monotonic() - start < 30


def test_a_hang_that_cannot_be_interrupted_is_killed_and_the_worker_replaced(pool, database):
    assert run(pool, database, "SELECT 1", seconds=5.0).status == "ok"
    result = run(pool, database, HANG, seconds=0.5)
    assert result.status == "timeout"
    assert run(pool, database, "SELECT 7", seconds=5.0).rows == ((7,),)
    assert pool.counters.read()["kills"] == 1


@pytest.mark.parametrize("sql", [BOMB.format(1000), "SELECT length(repeat('x', 3000000000))"])
def test_a_memory_bomb_is_a_limit_and_the_worker_lives_on(pool, database, sql):
    result = run(pool, database, sql, seconds=9.0)
    assert (result.status, result.error) == ("limit", "the statement needs too much memory")
    assert run(pool, database, BOMB.format(20), seconds=9.0).rows == ((20_000_000,),)
    assert pool.counters.read()["starts"] == 1


def test_the_program_may_write_no_file_and_hold_little_memory(pool, database):
    assert run(pool, database, "SELECT 1", seconds=5.0).status == "ok"
    (pid,) = [worker._process.pid for worker in pool._alive]
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in lines}
    assert limits["Max file size"] == ["0", "0"]
    assert limits["Max address space"] == [str(1024 << 20)] * 2
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    size = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert int(size["VmPeak"].split()[0]) < 320 << 10  # no threads of DuckDB, each of which would take 64 MiB
    assert size["Threads"].strip() == "1"


def test_little_memory_is_enough_for_ordinary_statements_on_many_databases(tmp_path, database):
    pool = WorkerPool(1, ("-I", "-X", "utf8", duckdb_worker.__file__, "256"), "DuckDB")
    with closing(pool):
        for number in range(6):
            copy = shutil.copy(database, tmp_path / f"copy_{number}.duckdb")
            sql = "SELECT count(DISTINCT a.range || p.name) FROM range(3000) a, pet p ORDER BY 1"
            assert run(pool, copy, sql, seconds=9.0).rows == ((9000,),)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.duckdb", None, "no such file"),
        ("garbage.duckdb", b"no database at all " * 99, "not a valid DuckDB database file"),
        ("empty.duckdb", b"", "not a valid DuckDB database file"),
        ("folder.duckdb", "folder", "it is no file"),
    ],
)
def test_a_database_that_cannot_be_read_is_our_fault_and_named_without_its_folder(ask, copied, name, content, reason):
    path = copied.with_name(name)
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    before = snapshot(copied.parent)
    result = ask(path, "SELECT 1")
    assert result.status == "infra"
    assert result.error.startswith(f"database {name} cannot be read: ")
    assert reason in result.error
    assert "/" not in result.error
    assert snapshot(copied.parent) == before


def test_several_workers_read_one_database(ask, pool, database):
    assert ask(database, "SELECT count(*) FROM pet").rows == [(3,)]
    assert run(pool, database, "SELECT count(*) FROM pet", seconds=5.0).rows == ((3,),)


def test_variables_of_the_program_are_no_tables(ask, database, monkeypatch):
    monkeypatch.setattr(duckdb_worker, "planted", pytest.importorskip("numpy").arange(3), raising=False)
    assert ask(database, "FROM planted").status == "error"


def test_the_settings_bound_memory_too(copied):
    system = DuckDBSystem(128)
    sql = "SELECT count(*) FROM (SELECT DISTINCT range FROM range(3000000))"
    assert answer(system, Request(str(copied), sql, time.monotonic() + 9, 9, 999), print)["status"] == "limit"
    system.close()


def test_a_database_with_an_unfinished_journal_is_our_fault_even_when_it_is_open(ask, copied):
    assert ask(copied, "SELECT 1").status == "ok"
    journal = copied.with_name(f"{copied.name}.wal")
    journal.write_bytes(b"")
    assert ask(copied, "SELECT 1").status == "ok"
    journal.write_bytes(b"x")
    result = ask(copied, "SELECT 1")
    assert result.status == "infra"
    assert "unfinished journal; open it once with DuckDB" in result.error


def test_a_sqlite_file_is_our_fault_and_leaves_no_trace(ask, tmp_path):
    path = tmp_path / "pets.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE pet (id)")
    before = snapshot(tmp_path)
    result = ask(path, "SELECT 1")
    assert result.status == "infra"
    assert "/" not in result.error
    assert snapshot(tmp_path) == before


def test_a_file_that_is_replaced_is_read_anew(ask, copied, tmp_path):
    assert ask(copied, "SELECT count(*) FROM pet").rows == [(3,)]
    os.replace(make(tmp_path / "new.duckdb", "CREATE TABLE pet AS SELECT 9 AS id"), copied)
    assert ask(copied, "SELECT id FROM pet").rows == [(9,)]


def test_databases_see_nothing_of_each_other_and_few_stay_open(ask, system, tmp_path):
    paths = [make(tmp_path / f"{i}" / "same.duckdb", f"CREATE TABLE t{i} AS SELECT {i} AS x") for i in range(10)]
    for number, path in enumerate(paths):
        assert ask(path, f"SELECT x FROM t{number}").rows == [(number,)]
        assert ask(path, "SHOW TABLES").rows == [(f"t{number}",)]
        assert ask(path, f"SELECT * FROM t{(number + 9) % 10}").status == "error"
    assert list(system._databases) == [str(path) for path in paths[2:]]


def test_idle_databases_are_closed_before_they_take_the_memory_of_the_next(system, ask, tmp_path, monkeypatch):
    paths = [make(tmp_path / f"{i}.duckdb", "CREATE TABLE t AS SELECT range FROM range(100000)") for i in range(4)]
    sizes = [path.stat().st_size for path in paths]
    monkeypatch.setattr(system, "_max_idle_bytes", sum(sizes[1:3]))
    for path in paths:
        assert ask(path, "SELECT count(*) FROM t").rows == [(100_000,)]
    assert list(system._databases) == [str(path) for path in paths[1:]]


def test_a_wrong_or_refused_statement_keeps_the_database_open(ask, system, database):
    ask(database, "SELECT 1")
    before = dict(system._databases)
    assert ask(database, "SELECT nope").status == "error"
    assert ask(database, "DROP TABLE pet").status == "denied"
    assert ask(database, "SELECT 1").status == "ok"
    assert dict(system._databases) == before


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "limit"),
        (duckdb.OutOfMemoryException("x"), "limit"),
        (duckdb.Error("std::bad_alloc"), "limit"),
        (duckdb.InternalException("INTERNAL Error: assertion"), "limit"),
        (duckdb.FatalException("FATAL Error: invalidated"), "limit"),
        (duckdb.SerializationException("Serialization Error: memory allocation failed"), "limit"),
        (duckdb.IOException("IO Error: checksum"), "infra"),
        (duckdb.Error("Corrupt database file: computed checksum 1 does not match"), "infra"),
        (KeyError("x"), "infra"),
        (duckdb.InterruptException("x"), "timeout"),
        (duckdb.BinderException("x"), "error"),
        (duckdb.SerializationException("Serialization Error: missing query node"), "error"),
    ],
)
def test_what_goes_wrong_while_running_has_its_status_and_its_end(ask, system, database, monkeypatch, error, status):
    ask(database, "SELECT 1")

    def fail(*_):
        raise error

    monkeypatch.setattr(system._guard, "check", fail)
    assert ask(database, "SELECT 1").status == status
    assert bool(system._databases) == (status == "error")


def test_the_time_zone_of_the_machine_changes_nothing(copied, monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    system = DuckDBSystem(1024)
    request = Request(str(copied), "SELECT TIMESTAMPTZ '2024-01-31 10:00:00'::VARCHAR", time.monotonic() + 5, 9, 999)
    assert answer(system, request, print)["rows"] == [["2024-01-31 10:00:00+00"]]
    system.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    source = SHARED / "text2sql" / "databases" / "world_1" / "world_1.sqlite"
    path = tmp_path_factory.mktemp("hostile") / "databases" / "world_1" / "world_1.duckdb"
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(source)) as lite, duckdb.connect(str(path)) as duck:
        duck.execute("BEGIN")
        for table in ("city", "country", "countrylanguage"):
            kinds = {"INTEGER": "BIGINT", "NUMERIC": "DOUBLE"}
            columns = lite.execute(f"SELECT name, upper(type) FROM pragma_table_info('{table}')").fetchall()
            typed = ", ".join(f'"{name}" {kinds.get(kind.split("(")[0], "VARCHAR")}' for name, kind in columns)
            duck.execute(f"CREATE TABLE {table} ({typed})")
            rows = [[None if value == "" else value for value in row] for row in lite.execute(f"SELECT * FROM {table}")]
            duck.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", rows)
        duck.execute("COMMIT")
    return path


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "hostile_sql.jsonl").exists(), reason="the shared data is not here")
def test_every_hostile_statement_ends_as_it_must_and_leaves_no_trace(pool, world):
    root = world.parents[2]
    (root / "out").mkdir()
    before = snapshot(root)
    places = {"{DB_DIR}": str(root / "databases"), "{OUT_DIR}": str(root / "out"), "{ROOT}": str(root)}

    def fill(text):
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    cases = map(json.loads, (SHARED / "hostile_sql.jsonl").read_text().splitlines())
    for case in (case for case in cases if case["engine"] in ("duckdb", "both") and case["sql"] is not None):
        result = run(pool, world, fill(case["sql"]), seconds=2.0)
        shown = f"{result.columns} {result.rows} {result.error}"
        assert result.status in case["must"], case["name"]
        assert not any(fill(text) in shown for text in (*(case.get("not_in") or ()), "{ROOT}")), case["name"]
        assert result.truncated or result.status != "ok" or not case.get("must_truncate"), case["name"]
        assert run(pool, world, "SELECT count(*) FROM city", seconds=5.0).rows == ((4079,),), case["name"]
    assert snapshot(root) == before
