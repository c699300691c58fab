"""Two threads and one engine."""

from __future__ import annotations

import threading
import time

import pytest

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


def test_the_time_of_play_is_known_while_it_lasts_and_that_of_the_trainer_is_not_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turnstile, now = Turnstile(), 1.0
    monkeypatch.setattr("lit_stepwise.rollout.turnstile.time.perf_counter", lambda: now)
    assert turnstile.seconds_played() == 0.0
    with turnstile:
        now = 3.0
        assert turnstile.seconds_played() == 2.0
        now = 3.5
    now = 5.0
    assert turnstile.seconds_played() == 2.5
    with turnstile.first():
        now = 10.0
    with turnstile:
        now = 10.25
        assert turnstile.seconds_played() == 2.75


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
