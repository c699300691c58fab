"""What is going on, in words and in lines of a terminal."""

from __future__ import annotations

import re

import pytest

from lit_stepwise.training.activity import Activity, drawn, in_order


def test_what_is_left_is_in_proportion_to_what_was_done_since_it_began() -> None:
    run = Activity("run", began=100.0, done=5, first=2, total=14)
    assert run.left(now=106.0) == 18.0  # 2 s each of 3, and 9 to come
    run.done = 2
    assert run.left(now=106.0) is None


def test_what_is_known_of_the_last_time_counts_more_and_is_never_negative() -> None:
    play = Activity("playing", began=100.0, done=1, total=8, expected=30.0)
    assert (play.left(now=112.0), play.left(now=140.0)) == (18.0, 0.0)
    assert play.fraction(now=112.0) == 1 / 8
    assert Activity("syncing", began=100.0, expected=30.0).fraction(now=106.0) == 0.2


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_line_fits_and_says_all_of_it(width: int) -> None:
    activities = [
        Activity("run", began=0.0, done=5, total=24, expected=7300.0),
        Activity("playing", began=90.0, done=37, total=128, note="8 executing", expected=25.0),
    ]
    metrics = in_order({"saved": 0.71, "accuracy": 0.523, "reward": 0.4614})
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in drawn(activities, metrics, 100.0, width)]
    assert [len(line) for line in lines[:2]] == [width, width]
    assert re.fullmatch(r"run     ━*[╸╺]?━* +5/24 +1:40, 2:00:00 left", lines[0])
    assert re.fullmatch(r"playing ━*[╸╺]?━* +37/128 8 executing +0:10, 0:15 left", lines[1])
    assert lines[2].rstrip() == "reward 0.461  accuracy 0.523  saved 0.710"


def test_what_is_too_long_is_cut() -> None:
    metrics = {f"a_long_name_{number}": "0.125" for number in range(9)}
    (_, line) = drawn([Activity("run", began=0.0)], metrics, 1.0, 50)
    assert len(re.sub(r"\x1b\[[\d;]*m", "", line)) <= 50
