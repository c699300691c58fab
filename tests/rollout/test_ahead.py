"""Play that runs ahead."""

from __future__ import annotations

import threading

import pytest

from lit_stepwise.rollout.ahead import Ahead


def test_iterations_are_played_once_and_in_order_while_others_are_trained() -> None:
    played: list[int] = []
    ahead = Ahead(lambda iteration: 10 * iteration, lambda iteration, drawn: played.append(iteration) or drawn)
    for iteration in (3, 4, 3, 5):
        ahead.start(iteration)
    ahead.settle()
    assert played == [3, 4, 5]
    assert [ahead.take(iteration) for iteration in (3, 4, 5)] == [30, 40, 50]
    assert played == [3, 4, 5]
    ahead.close(1)


def test_what_was_not_started_is_played_when_it_is_asked_for() -> None:
    ahead = Ahead(str, lambda iteration, drawn: f"{drawn} was drawn")
    assert ahead.take(7) == "7 was drawn"
    ahead.close(1)


def test_an_error_reaches_whoever_takes_the_iteration() -> None:
    ahead = Ahead(str, lambda iteration, drawn: 1 // iteration)
    ahead.start(0)
    ahead.start(1)
    with pytest.raises(ZeroDivisionError):
        ahead.take(0)
    assert ahead.take(1) == 1
    ahead.close(1)


def test_what_is_dropped_is_played_again_when_it_is_asked_for() -> None:
    played: list[int] = []
    ahead = Ahead(str, lambda iteration, drawn: played.append(iteration) or len(played))
    ahead.start(1)
    ahead.start(2)
    ahead.drop()
    assert played == [1, 2]
    assert (ahead.take(1), played) == (3, [1, 2, 1])
    ahead.close(1)


def test_closing_starts_nothing_more_and_waits_for_what_is_in_play() -> None:
    played, go_on = [], threading.Event()

    def play(iteration: int, drawn: str) -> None:
        go_on.wait(60)
        played.append(iteration)

    ahead = Ahead(str, play)
    ahead.start(1)
    ahead.start(2)
    threading.Timer(0.05, go_on.set).start()
    ahead.close(10)
    assert played == [1]


def test_what_is_played_is_drawn_by_whoever_starts_it_and_then() -> None:
    known, hold, threads = ["a"], threading.Event(), []

    def draw(iteration: int) -> str:
        threads.append(threading.current_thread())
        return "".join(known)

    ahead = Ahead(draw, lambda iteration, drawn: hold.wait(60) and drawn)
    ahead.start(1)
    known.append("b")
    ahead.start(2)
    known.append("c")
    hold.set()
    assert [ahead.take(1), ahead.take(2)] == ["a", "ab"]
    assert set(threads) == {threading.current_thread()}
    ahead.close(1)
