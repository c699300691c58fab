import sqlite3
from contextlib import closing

import pytest

from lit_stepwise.text2sql.executors import SQLiteExecutor
from tests.text2sql.running import children


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
    """Of one worker, and of time for all that ends."""
    yield from closed_at_the_end(SQLiteExecutor(num_workers=1, timeout_seconds=30.0))


@pytest.fixture
def impatient():
    """The same with one second."""
    yield from closed_at_the_end(SQLiteExecutor(num_workers=1, timeout_seconds=1.0))


def closed_at_the_end(executor):
    yield executor
    executor.close()
    assert children() == []
