import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from lit_stepwise.sandbox import pool as pool_of_workers
from lit_stepwise.sandbox import process
from lit_stepwise.sandbox.pool import WorkerPool, _Turn
from lit_stepwise.sandbox.process import Answer, Died, Worker
from tests.waiting import wait_until

PROGRAM = """
import json, struct, sys, time
def say(text, length=None):
    data = text.encode()
    sys.stdout.buffer.write(struct.pack("<I", length or len(data)) + data)
    sys.stdout.buffer.flush()
say('{"id": 0, "status": "ok"}')
while header := sys.stdin.buffer.read(4):
    request = json.loads(sys.stdin.buffer.read(*struct.unpack("<I", header)))
    for message in json.loads(request["sql"]):
        if isinstance(message, int):
            sys.exit(message)
        elif isinstance(message, float):
            time.sleep(message)
        else:
            say(message.replace("ID", str(request["id"])), 4_000_000_000 if "4 GB" in message else None)
"""
"""A worker that answers with what the statement, a JSON list, holds. A number is an exit code, or seconds to wait."""
GOOD = '{"id": ID, "status": "ok", "columns": ["a", "b"], "rows": [[5, "six"]], "truncated": true}'
MAX_ROWS, MAX_BYTES = 4, 64


@pytest.fixture
def worker():
    with closing(Worker(["-I", "-S", "-c", PROGRAM])) as worker:
        worker.wait_until_ready()
        yield worker


def request(*messages, timeout_seconds=5.0):
    return {
        **{"database": "", "sql": json.dumps(messages), "timeout_seconds": timeout_seconds},
        **{"max_rows": MAX_ROWS, "max_bytes": MAX_BYTES},
    }


def ask(worker, *messages, **settings):
    assert worker.begin(request(*messages, **settings))
    answer = worker.receive()
    return answer.result(), answer.num_bytes


def test_parts_are_put_together_in_order(worker):
    result, num_bytes = ask(worker, '[[1, "two"]]', '[[3, "four"], [null, 0.5]]', GOOD)
    assert result.rows == ((1, "two"), (3, "four"), (None, 0.5), (5, "six"))
    assert (result.status, result.columns, result.truncated, result.error) == ("ok", ("a", "b"), True, "")
    assert num_bytes == 4 * 3 + len('[[1, "two"]][[3, "four"], [null, 0.5]]') + len(GOOD) - 1  # ID is one digit


def test_answers_that_come_close_together_are_told_apart(worker):
    for number in range(1, 5):
        answer = GOOD.replace("5", str(number))
        assert ask(worker, answer)[0].rows == ((number, "six"),)


def test_parts_of_a_statement_that_failed_in_the_end_are_dropped(worker):
    result, _ = ask(worker, "[[1], [2]]", '{"id": ID, "status": "error", "error": "overflow", "rows": [[3]]}')
    assert (result.status, result.error, result.rows, result.columns) == ("error", "overflow", (), ())


@pytest.mark.parametrize(
    "message",
    [
        *("nonsense", "", "5", "null", '"text"', "[", "[" * 9999, "{}"),
        *("[]", "[5]", "[[[1]]]", '[[{"a": 1}]]', "[null]"),
        GOOD.replace("ID", "99"),
        GOOD.replace("ID", "null"),
        GOOD.replace('"ok"', '"fine"'),
        GOOD.replace('"ok"', "[]"),
        GOOD.replace('"a"', "7"),
        GOOD.replace('["a", "b"]', '"ab"'),
        GOOD.replace("true", '"yes"'),
        GOOD.replace('[[5, "six"]]', "null"),
        GOOD.replace('[[5, "six"]]', '{"base64": "AA=="}'),
        GOOD.replace("5", '{"base64": 6}'),
        GOOD.replace('[[5, "six"]]', "[[1], [2], [3], [4], [5]]"),  # a row more than asked for
        GOOD.replace('[[5, "six"]]', "[[1, 2, 3, 4, 5, 6, 7, 8, 9]]"),  # 72 bytes
        '{"id": ID, "status": "error", "error": 5}',
        "4 GB",
    ],
)
def test_nonsense_is_a_worker_as_good_as_dead(worker, message):
    with pytest.raises(Died) as died:
        ask(worker, message)
    assert not died.value.from_outside


def test_a_worker_cannot_send_more_rows_in_parts_than_were_asked_for(worker):
    with pytest.raises(Died):
        ask(worker, "[[1], [2]]", "[[3], [4]]", GOOD)


def test_a_worker_cannot_send_more_bytes_than_the_request_allows(worker, monkeypatch):
    monkeypatch.setattr(process, "WIRE_BYTES_BESIDES", 500)
    fits = f'[["{"x" * 400}"]]'  # 64 * 8 + 500 = 1012 bytes in all
    assert len(ask(worker, fits, fits, GOOD)[0].rows) == 3
    with pytest.raises(Died):
        ask(worker, fits, fits, fits, GOOD)


def test_the_largest_honest_result_is_within_what_the_parent_takes():
    worst = {"\x01" * 64: 64, -(2**127): 8, -5e-324: 8}  # a value and its size
    for value, size in worst.items():
        assert len(process.pack([[value]])) - len("[[]]") < size * process.WIRE_BYTES_PER_BYTE


def test_a_worker_that_stops_in_the_middle_of_its_answer_is_late(worker, monkeypatch):
    monkeypatch.setattr(process, "TRANSFER_SECONDS", 0.2)
    with pytest.raises(TimeoutError):
        ask(worker, "[[1]]", 9.0)


@pytest.mark.clock
def test_an_answer_that_began_in_time_may_take_its_time_to_arrive(worker):
    result, _ = ask(worker, "[[1]]", 1.5, GOOD, timeout_seconds=0.5)
    assert len(result.rows) == 2


@pytest.mark.clock
def test_an_answer_that_begins_late_is_late(worker):
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        ask(worker, 9.0, GOOD, timeout_seconds=0.1)
    assert 0.6 <= time.monotonic() - began < 8


@pytest.mark.parametrize("code", [0, 1])
def test_a_worker_that_ends_itself_is_to_blame(worker, code):
    with pytest.raises(Died) as died:
        ask(worker, code)
    assert not died.value.from_outside


@pytest.mark.parametrize(
    ("number", "from_outside"),
    [
        *((signal.SIGKILL, True), (signal.SIGTERM, True), (signal.SIGHUP, True), (signal.SIGXCPU, True)),
        *((signal.SIGSEGV, False), (signal.SIGABRT, False), (signal.SIGBUS, False), (signal.SIGILL, False)),
    ],
)
def test_who_is_to_blame_is_told_by_the_signal(worker, number, from_outside):
    worker.begin(request(9.0))
    os.kill(worker._process.pid, number)
    with pytest.raises(Died) as died:
        worker.receive()
    assert died.value.from_outside is from_outside


def test_a_worker_that_its_own_alarm_ended_is_late(worker):
    worker.begin(request(9.0))
    os.kill(worker._process.pid, signal.SIGALRM)
    with pytest.raises(TimeoutError):
        worker.receive()


def test_a_request_to_a_dead_worker_is_not_taken_and_has_no_answer(worker):
    worker.kill()
    assert not worker.begin(request(GOOD))
    with pytest.raises(Died):
        worker.receive()


def test_a_request_larger_than_the_pipe_arrives_whole(worker):
    assert ask(worker, *["[[1]]"] * 3, GOOD + " " * 300_000)[0].rows[:2] == ((1,), (1,))


def test_no_file_is_left_open_by_a_worker():
    before = sorted(os.listdir("/proc/self/fd"))
    worker = Worker(["-I", "-S", "-c", PROGRAM])
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2
    worker.close()
    worker.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not Path(f"/proc/{worker._process.pid}").exists()


@pytest.fixture
def pool():
    pool = WorkerPool(1, ["-I", "-S", "-c", PROGRAM], "Nonsense")
    yield pool
    pool.close()


def test_a_pool_takes_two_of_nonsense_for_a_statement_that_crashes_workers(pool):
    result, _ = pool.run(request("nonsense"), 0)
    assert (result.status, result.error) == ("limit", "the statement needs too much memory, or crashed Nonsense")
    assert pool.run(request(GOOD), 0)[0].rows == ((5, "six"),)
    counted = pool.counters.read()
    assert (counted["crashes"], counted["starts"], counted["kills"]) == (2, 3, 0)


def test_the_request_that_waits_begins_before_the_answer_is_read(pool, monkeypatch):
    begun, real_begin, real_result = [], Worker.begin, Answer.result

    def begin(worker, wanted):
        begun.append(wanted)
        return real_begin(worker, wanted)

    def result(answer):
        wait_until(lambda: len(begun) == 2)
        return real_result(answer)

    monkeypatch.setattr(Worker, "begin", begin)
    monkeypatch.setattr(Answer, "result", result)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(pool.run, request(0.2, GOOD), 0)
        wait_until(lambda: begun)
        second = threads.submit(pool.run, request("[[7, null]]", GOOD), 0)
        assert first.result()[0].rows == ((5, "six"),)
        assert second.result()[0].rows == ((7, None), (5, "six"))


def test_a_request_that_follows_nonsense_is_neither_lost_nor_blamed(pool):
    with ThreadPoolExecutor(4) as threads:
        nonsense = threads.submit(pool.run, request(0.2, "nonsense"), 0)
        wait_until(lambda: pool.counters.read()["starts"])
        others = [threads.submit(pool.run, request(GOOD.replace("5", str(number))), 0) for number in (1, 2, 3)]
        assert nonsense.result()[0].status == "limit"
        assert [other.result()[0].rows for other in others] == [((number, "six"),) for number in (1, 2, 3)]
    counted = pool.counters.read()
    assert (counted["crashes"], counted["starts"]) == (2, 3)


def test_a_worker_that_died_idle_is_no_statements_fault(pool, monkeypatch):
    monkeypatch.setattr(pool_of_workers, "MAX_CRASHES", 1)
    assert pool.run(request(GOOD, 1), 0)[0].status == "ok"  # and ends itself after its answer
    (worker,) = pool._alive
    worker._process.wait(60)
    assert pool.run(request(GOOD), 0)[0].status == "ok"
    assert pool.counters.read()["crashes"] == 1


def test_a_worker_that_close_ended_is_handed_no_request_of_afterwards(pool, monkeypatch):
    with ThreadPoolExecutor(2) as threads:
        later, real = [], Worker.receive

        def receive(worker):
            answer = real(worker)
            if not later:
                pool.close()
                later.append(threads.submit(pool.run, request(GOOD), 1))
                wait_until(lambda: pool._waiting)
            return answer

        monkeypatch.setattr(Worker, "receive", receive)
        assert threads.submit(pool.run, request(GOOD), 0).result()[0].status == "ok"
        assert later[0].result()[0].rows == ((5, "six"),)


@pytest.mark.parametrize("comes_first", [False, True])
def test_who_is_interrupted_while_waiting_leaves_the_place_to_others(pool, monkeypatch, comes_first):
    real = _Turn.wait

    def wait(turn):
        if comes_first:
            real(turn)
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as threads, monkeypatch.context() as patch:
        patch.setattr(_Turn, "wait", wait)
        first = threads.submit(pool.run, request(0.2, GOOD), 0)
        wait_until(lambda: pool.counters.read()["starts"])
        with pytest.raises(KeyboardInterrupt):
            pool.run(request(9.0), 0)
        assert first.result()[0].status == "ok"
    began = time.monotonic()
    assert pool.run(request(GOOD), 0)[0].rows == ((5, "six"),)
    assert time.monotonic() - began < 8
    assert pool.counters.read()["starts"] == 1 + comes_first


def test_a_request_of_before_the_pool_was_closed_runs_no_more(pool):
    pool.close()
    assert pool.run(request(GOOD), 0)[0].error == "the executor was closed"
    assert pool.counters.read()["starts"] == 0
    assert pool.run(request(GOOD), 1)[0].status == "ok"
    assert pool.run(request(GOOD), 0)[0].error == "the executor was closed"  # though there is a worker
