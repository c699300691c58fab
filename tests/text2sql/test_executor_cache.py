import os
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from lit_stepwise.text2sql.executors import SQLiteExecutor
from tests.text2sql.running import COUNT_TO


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
