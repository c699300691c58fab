import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from lit_stepwise.sandbox.sqlite_worker import MAX_CONNECTIONS
from lit_stepwise.text2sql.executors import SQLiteExecutor
from tests.text2sql.running import ENDLESS, HANG, children

SORT_MEGABYTES = (
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT {0})"
    " SELECT sum(length(s)) FROM (SELECT printf('%1000000d', x) AS s FROM c ORDER BY 1)"
)


@pytest.mark.clock
def test_an_endless_query_stops_at_its_deadline_and_the_worker_lives_on(impatient, database):
    impatient.execute(database, "SELECT 1")
    before = children()
    result = impatient.execute(database, ENDLESS)
    assert result.status == "timeout"
    assert 1.0 <= result.seconds < 6
    assert impatient.execute(database, "SELECT 7").rows == ((7,),)
    assert children() == before


@pytest.mark.clock
def test_a_hang_that_cannot_be_interrupted_is_killed_and_the_worker_replaced(impatient, database):
    impatient.execute(database, "SELECT 1")
    before = children()
    result = impatient.execute(database, HANG)
    assert result.status == "timeout"
    assert 1.5 <= result.seconds < 6
    assert impatient.execute(database, "SELECT 7").rows == ((7,),)
    assert set(children()).isdisjoint(before)


@pytest.mark.clock
def test_a_worker_that_reads_no_more_is_killed_however_long_the_statement(database):
    with closing(SQLiteExecutor(num_workers=1, timeout_seconds=0.2, max_sql_chars=300_000)) as executor:
        executor.execute(database, "SELECT 1")
        os.kill(*children(), signal.SIGSTOP)
        assert executor.execute(database, f"SELECT 7 -- {'x' * 200_000}").status == "timeout"
        assert executor.execute(database, f"SELECT 7 -- {'x' * 200_000}").rows == ((7,),)


@pytest.mark.clock
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
