"""Says where everything stands when nothing has moved for a while."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time


class Heartbeat:
    """Prints the stacks of all threads to stderr once ``seconds`` have passed without a ``beat``; None never does.

    It ends nothing: a training step may take long for good reasons. Deadlines end what waits.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._phase = ""
        self._last = time.monotonic()
        self._silent = False
        self._closed = threading.Event()
        if seconds is not None:
            threading.Thread(target=self._watch, args=(seconds,), name="heartbeat", daemon=True).start()

    def beat(self, phase: str) -> None:
        """Something moved; ``phase`` says what is going on."""
        self._phase, self._last, self._silent = phase, time.monotonic(), False

    def close(self) -> None:
        """Watch no more. Idempotent."""
        self._closed.set()

    def _watch(self, seconds: float) -> None:
        while not self._closed.wait(min(seconds / 4, 5.0)):
            quiet = time.monotonic() - self._last
            if self._phase and quiet > seconds and not self._silent:
                self._silent = True
                sys.stderr.write(
                    f"no sign of life for {quiet:.0f} s while {self._phase} "
                    f"(rollout.deadlines.heartbeat_seconds={seconds:g}); where all threads stand:\n"
                )
                sys.stderr.flush()
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
