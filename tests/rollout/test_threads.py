"""Threads that nobody waits for."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from lit_stepwise.rollout.threads import DaemonThreads


def test_a_result_and_an_error_come_back_to_whoever_asks() -> None:
    threads = DaemonThreads(2, "test")
    assert threads.submit(divmod, 17, 5).result(60) == (3, 2)
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 17, 0).result(60)
    threads.close()


def test_so_many_run_at_a_time_and_no_more() -> None:
    threads, lock, running, most = DaemonThreads(3, "test"), threading.Lock(), 0, 0

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    for future in [threads.submit(work) for _ in range(9)]:
        future.result(60)
    threads.close()
    assert most == 3


def test_a_thread_that_hangs_is_replaced_when_it_is_given_up() -> None:
    threads, release = DaemonThreads(1, "test"), threading.Event()
    hung, queued = threads.submit(release.wait, 20), threads.submit(divmod, 9, 4)
    time.sleep(0.05)
    assert not queued.done()
    threads.give_up(hung)
    assert queued.result(60) == (2, 1)
    release.set()
    threads.close()


def test_what_is_given_up_before_it_began_is_never_run() -> None:
    threads, release, ran = DaemonThreads(1, "test"), threading.Event(), threading.Event()
    hung, queued = threads.submit(release.wait, 20), threads.submit(ran.set)
    threads.give_up(queued)
    release.set()
    assert hung.result(60)
    threads.submit(divmod, 1, 1).result(60)
    threads.close()
    assert not ran.is_set()


def test_threads_end_when_they_are_closed() -> None:
    threads = DaemonThreads(2, "closing")
    for future in [threads.submit(time.sleep, 0.01) for _ in range(2)]:
        future.result(60)
    threads.close()
    deadline = time.monotonic() + 60
    while any(each.name.startswith("closing") for each in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_ends_though_a_thread_hangs() -> None:
    program = (
        "import threading; from lit_stepwise.rollout.threads import DaemonThreads\n"
        "DaemonThreads(1, 'test').submit(threading.Event().wait)\nprint('bye')"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True)
    assert run.stdout == "bye\n"
