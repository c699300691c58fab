"""What the time of a run goes into."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class PhaseClock:
    """Splits the time of the thread that trains into phases, without a gap: it is always in exactly one of them.

    The phases are those of the hook ``on_phase``: ``start`` (of the engine), ``sync``, ``play`` or, where play runs
    ahead, ``wait`` for it, ``prepare`` (credit, the store, log-probabilities of before the update), ``train``,
    ``evaluate``, ``save``, and ``other`` for all the rest.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.phase = "other"
        self.began = now()
        """When this phase began, on the clock of ``now``."""
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str) -> float:
        """From here on it is this phase; the seconds of the one that ends."""
        now = self._now()
        ended, taken = self.phase, now - self.began
        self._seconds[ended] = self._seconds.get(ended, 0.0) + taken
        self.phase, self.began = phase, now
        return taken

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap, or the beginning; they add up to the time that passed."""
        self.enter(self.phase)
        seconds, self._seconds = self._seconds, {}
        return seconds


def added(seconds: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """Two laps as one."""
    return {phase: seconds.get(phase, 0.0) + more.get(phase, 0.0) for phase in {**seconds, **more}}


def shares(seconds: Mapping[str, float]) -> str:
    """``play 5.2, train 3.1``: the largest first, none that would be 0.0."""
    ordered = sorted(seconds.items(), key=lambda each: -each[1])
    return ", ".join(f"{phase} {value:.1f}" for phase, value in ordered if value >= 0.05)


def clock_time(seconds: float) -> str:
    """``0:05``, ``12:40``, ``3:02:01``, ``4 d 3:02``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
