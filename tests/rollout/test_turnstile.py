"""Two threads and one engine."""

from __future__ import annotations

import threading
import time

from lit_stepwise.rollout.turnstile import Turnstile


def test_the_trainer_waits_for_one_call_of_whoever_plays_and_not_for_the_next() -> None:
    turnstile, log, stop = Turnstile(), [], threading.Event()

    def play() -> None:
        while not stop.is_set():
            with turnstile:
                log.append("step")
                time.sleep(0.005)

    thread = threading.Thread(target=play)
    thread.start()
    time.sleep(0.02)
    for _ in range(20):
        log.append("wanted")
        with turnstile.first():
            log.append("trainer")
            time.sleep(0.001)
    stop.set()
    thread.join(5)
    between = [log[i : log.index("trainer", i)].count("step") for i, what in enumerate(log) if what == "wanted"]
    assert len(between) == 20
    assert max(between) <= 1  # one may be about to begin


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
    thread.join(10)
    assert most == 1
