import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from lit_stepwise.text2sql.executors import SQLiteExecutor
from tests.text2sql.running import ENDLESS, HANG, children, run
from tests.waiting import wait_until


@pytest.mark.clock
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
        run(ask())
        assert 0.3 < executor.stats()["queue_seconds"] - in_threads < time.monotonic() - began - 0.3


@pytest.mark.clock
def test_an_event_loop_goes_on_while_statements_run(impatient, database):
    async def play():
        running = asyncio.gather(*(impatient.aexecute(database, f"{ENDLESS} -- {number}") for number in range(2)))
        delays = []
        while not running.done():
            start = time.monotonic()
            await asyncio.sleep(0.01)
            delays.append(time.monotonic() - start)
        return await running, delays

    results, delays = run(play())
    assert [result.status for result in results] == ["timeout", "timeout"]
    assert len(delays) > 20  # in the two seconds that both took
    assert max(delays) < 0.9


def test_coroutines_get_each_their_own_answer_from_few_threads(database):
    async def play():
        statements = [f"SELECT {number}" for number in range(50)]
        return await asyncio.gather(*(executor.aexecute(database, sql) for sql in statements))

    before = threading.active_count()
    with closing(SQLiteExecutor(num_workers=2)) as executor:
        assert [result.rows for result in run(play())] == [((number,),) for number in range(50)]
        assert threading.active_count() <= before + 2
        assert len(children()) <= 2
    wait_until(lambda: threading.active_count() == before)


@pytest.mark.clock
def test_an_awaiter_that_gives_up_is_not_held_up_and_its_statement_harms_nobody(impatient, database):
    async def play():
        start = time.monotonic()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(impatient.aexecute(database, HANG), 0.1)
        cancelled = [asyncio.ensure_future(impatient.aexecute(database, HANG)) for _ in range(3)]
        await asyncio.sleep(0.01)
        for task in cancelled:
            task.cancel()
        await asyncio.wait(cancelled)
        return time.monotonic() - start, await impatient.aexecute(database, "SELECT 7")

    seconds, result = run(play())
    assert seconds < 1.4  # the first is killed after 1.5
    assert result.rows == ((7,),)
    assert impatient.stats()["statements"] == 2  # those that were cancelled in the queue never ran


def test_close_tells_awaiters_too_and_a_later_statement_starts_anew(executor, database):
    async def play():
        running = [asyncio.ensure_future(executor.aexecute(database, f"{ENDLESS} -- {number}")) for number in range(3)]
        await asyncio.sleep(0.2)
        executor.close()
        results = await asyncio.gather(*running)
        assert children() == []
        return results, await executor.aexecute(database, "SELECT 7")

    results, later = run(play())
    assert [(result.status, result.error) for result in results] == [("infra", "the executor was closed")] * 3
    assert later.rows == ((7,),)
    assert (executor.stats()["crashes"], executor.stats()["kills"]) == (0, 0)
