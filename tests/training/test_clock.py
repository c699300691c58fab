"""Where time goes, on a clock that is set by hand."""

from __future__ import annotations

import pytest

from lit_stepwise.training.clock import PhaseClock, added, clock_time, shares


class Watch:
    """Says the time that it was last given."""

    time = 10.0

    def __call__(self) -> float:
        return self.time


def test_every_second_belongs_to_one_phase_and_a_lap_takes_them_all() -> None:
    watch = Watch()
    clock = PhaseClock(watch)
    for time, phase in ((12.0, "play"), (15.0, "train"), (19.0, "play")):
        watch.time = time
        clock.enter(phase)
    watch.time = 20.0
    assert clock.lap() == {"other": 2.0, "play": 4.0, "train": 4.0}
    watch.time = 27.0
    assert clock.enter("save") == 7.0
    assert (clock.lap(), clock.phase) == ({"play": 7.0, "save": 0.0}, "save")


def test_laps_add_up_and_are_written_by_size() -> None:
    both = added({"play": 1.0, "save": 0.04}, {"play": 2.5, "train": 7.0})
    assert both == {"play": 3.5, "save": 0.04, "train": 7.0}
    assert shares(both) == "train 7.0, play 3.5"


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(4.6, "0:05"), (59.7, "1:00"), (760, "12:40"), (10921, "3:02:01"), (86399, "23:59:59"), (270120, "3 d 3:02")],
)
def test_times_are_written_as_on_a_clock(seconds: float, written: str) -> None:
    assert clock_time(seconds) == written
