"""How the thread that plays and the one that trains share an engine."""

from __future__ import annotations

import threading
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

    def __enter__(self) -> None:
        self._open.wait()
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Enter after one more call of the engine at most."""
        self._open.clear()
        try:
            with self._lock:
                yield
        finally:
            self._open.set()
