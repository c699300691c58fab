"""How the thread that plays and the one that trains share an engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lit_stepwise.types import Completion


class Turnstile:
    """One thread at a time. Who plays enters for every call of the engine; the trainer goes ``first``.

    A plain lock would not do: whoever plays takes it again before anybody else wakes up.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._open.set()
        self.stopped = False
        """Play is to end: nobody wants what it brings any more."""
        self.stash: list[Completion] = []
        """What was finished while the trainer used the engine, for whoever plays."""
        self._played: tuple[float, float | None] = (0.0, None)  # seconds up to now, and when who is inside came

    def __enter__(self) -> None:
        self._open.wait()
        self._lock.acquire()
        self._played = (self._played[0], time.perf_counter())

    def __exit__(self, *exception: object) -> None:
        self._played = (self.seconds_played(), None)
        self._lock.release()

    def seconds_played(self) -> float:
        """Time up to now that who plays was inside, whatever the phase."""
        seconds, came = self._played
        return seconds + (time.perf_counter() - came if came is not None else 0.0)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Enter after one more call of the engine at most."""
        self._open.clear()
        try:
            with self._lock:
                yield
        finally:
            self._open.set()
