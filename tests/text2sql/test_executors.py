import copy
import math
import pickle
import shutil
from contextlib import closing
from pathlib import Path

import duckdb
import pytest

from lit_stepwise.errors import ConfigError
from lit_stepwise.text2sql.executors import DuckDBExecutor, SQLiteExecutor
from tests.text2sql.running import ENDLESS, children


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


def test_a_file_of_the_other_system_is_told_with_the_executor_that_reads_it(executor, database):
    animals = database.with_name("animals.db")
    with closing(duckdb.connect(animals)) as connection:
        connection.execute("CREATE TABLE animal AS SELECT 7 AS id")
    says = "needs executor DuckDBExecutor: animals.db is a DuckDB database"
    assert (executor.execute(animals, "SELECT 1").status, executor.execute(animals, "SELECT 1").error) == (
        "infra",
        says,
    )
    with closing(DuckDBExecutor(num_workers=1)) as other:
        assert other.execute(animals, "SELECT id FROM animal").rows == ((7,),)
        result = other.execute(database, "SELECT 1")
    says = "needs executor SQLiteExecutor: pets.sqlite is a SQLite database"
    assert (result.status, result.error) == ("infra", says)
