"""Two threads and one engine."""

from __future__ import annotations

import threading
import time

from lit_stepwise.rollout.turnstile import Turnstile
from tests.waiting import wait_until


def test_the_trainer_waits_for_one_call_of_whoever_plays_and_not_for_the_next() -> None:
    turnstile, log, stop = Turnstile(), [], threading.Event()

    def play() -> None:
        while not stop.is_set():
            with turnstile:
                log.append("step")
                wait_until(lambda: not turnstile._open.is_set() or stop.is_set())  # the trainer comes during a call

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    for _ in range(20):
        wait_until(lambda: log[-1:] == ["step"])
        with turnstile.first():
            log.append("trainer")
    stop.set()
    thread.join(60)
    assert log[:40] == ["step", "trainer"] * 20


def test_they_are_never_in_at_the_same_time() -> None:
    turnstile, inside, most = Turnstile(), [], 0

    def enter(who: str) -> None:
        nonlocal most
        inside.append(who)
        most = max(most, len(inside))
        time.sleep(0.0005)
        inside.pop()

    def play() -> None:
        for _ in range(100):
            with turnstile:
                enter("player")

    thread = threading.Thread(target=play)
    thread.start()
    for _ in range(30):
        with turnstile.first():
            enter("trainer")
    thread.join(60)
    assert most == 1
