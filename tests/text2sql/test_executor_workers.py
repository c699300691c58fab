import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from lit_stepwise.sandbox.pool import MAX_KILLS
from lit_stepwise.text2sql.executors import SQLiteExecutor
from tests.text2sql.running import COUNT_TO, ENDLESS, HANG, children, is_running
from tests.waiting import has_open, wait_until


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


@pytest.mark.clock
@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGTERM])
def test_a_statement_outlives_workers_that_are_killed_from_outside(impatient, database, with_signal):
    impatient.execute(database, "SELECT 1")
    with ThreadPoolExecutor(1) as threads:
        ending = threads.submit(end_workers, database, 2, with_signal)
        result = impatient.execute(database, HANG)  # would be a limit, were it held to have crashed them
        ending.result()
    assert result.status == "timeout"
    assert (impatient.stats()["crashes"], impatient.stats()["kills"]) == (2, 1)


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


def test_who_comes_first_is_served_first(impatient, database):
    served = []

    def ask(number):
        impatient.execute(database, COUNT_TO.format(f"WHERE x < {100_000 + number}"))
        served.append(number)

    threads = [threading.Thread(target=impatient.execute, args=(database, ENDLESS))]
    threads += [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    for number, thread in enumerate(threads):
        thread.start()
        wait_until(lambda number=number: len(impatient._live.pool._waiting) == number)
    for thread in threads:
        thread.join()
    assert served == [0, 1, 2, 3, 4]


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


@pytest.mark.clock
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


@pytest.mark.clock
def test_statistics_have_their_names_from_the_start_and_count_every_statement(impatient, database):
    start = impatient.stats()
    assert set(start) == {
        *("statements", "cache_hits", "ok", "error", "denied", "timeout", "limit", "infra"),
        *("kills", "crashes", "starts", "queue_seconds", "run_seconds"),
    }
    assert set(start.values()) == {0}
    statements = ["SELECT 1", "SELECT 1", "SELECT 1", "SELECT 2", "SELECT nope", "DROP TABLE pet", None, HANG]
    for sql in statements:
        impatient.execute(database, sql)
    impatient.execute(database, "x" * 20_001)
    impatient.execute(database.with_name("none.sqlite"), "SELECT 1")
    end = dict(impatient.stats())
    assert 1.5 <= end.pop("run_seconds") < 9
    assert 0 < end.pop("queue_seconds") < 1
    assert end == {
        **{"statements": 10, "ok": 4, "cache_hits": 2, "error": 2, "denied": 1, "timeout": 1, "limit": 1, "infra": 1},
        **{"kills": 1, "crashes": 0, "starts": 2},
    }


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
