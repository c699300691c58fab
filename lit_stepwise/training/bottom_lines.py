"""Lines that stay at the bottom of a terminal while everything else scrolls above them."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TextIO

_SMALLEST = 12
"""Rows of a terminal in which it is worth keeping some."""


class BottomLines:
    """Takes the last ``num_lines`` rows out of the part of the terminal that scrolls, as apt does.

    Bars of rich and tqdm stand where the next output goes, so that they have to catch it on its way to the terminal,
    which they cannot where it comes from another process, or a logger that holds the stream. This touches nobody's.
    """

    def __init__(self, file: TextIO, num_lines: int) -> None:
        self._file = file
        self._num_lines = num_lines
        self._size = (0, 0)

    def draw(self, lines_of: Callable[[int], Sequence[str]]) -> None:
        """Write what ``lines_of`` gives for a number of columns: at most ``num_lines`` lines, none of them wider."""
        columns, rows = os.get_terminal_size(self._file.fileno())
        if rows < _SMALLEST:
            return
        begin = "" if self._size == (columns, rows) else self._reserve(rows)
        if not self._size[1]:
            atexit.register(self.close)
        self._size = (columns, rows)
        lines = list(lines_of(columns))
        lines = [""] * (self._num_lines - len(lines)) + lines
        first = rows - self._num_lines + 1
        drawn = "".join(f"\x1b[{first + i};1H\x1b[2K{line}\x1b[0m" for i, line in enumerate(lines))
        self._write(f"{begin}\x1b7{drawn}\x1b8")  # at once, so that nobody's output comes in between

    def close(self) -> None:
        """Give the rows back, empty. Idempotent."""
        if self._size[1]:
            self._size = (0, 0)
            atexit.unregister(self.close)
            self._write("\x1b7\x1b[r\x1b8\x1b[J")

    def _reserve(self, rows: int) -> str:
        """Make room below the cursor, which stays where it is among what has been written."""
        n = self._num_lines
        down = "\x1bD" * n
        return f"\x1b7\x1b[r\x1b8{down}\x1b[{n}A\x1b7\x1b[1;{rows - n}r\x1b8"

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


class Ticker:
    """Calls ``tick`` every so many seconds in a thread of its own, from ``start`` to ``stop``."""

    def __init__(self, tick: Callable[[], None], seconds: float) -> None:
        self._tick = tick
        self._seconds = seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        """Call it for the first time in so many seconds."""
        self._thread.start()

    def stop(self) -> None:
        """Return when no call is under way any more."""
        self._stopped.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            self._tick()


def is_terminal() -> bool:
    """Whether both stdout and stderr are a terminal that understands control codes; else one of them is kept."""
    both = sys.stdout.isatty() and sys.stderr.isatty()
    return both and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
