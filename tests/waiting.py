"""For tests of what happens in another thread or process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def wait_until(condition: Callable[[], object]) -> None:
    """Return as soon as it holds, and fail if it does not within a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


def has_open(pid: int, file: Path) -> bool:
    """Whether a process has this very file open, as a SQL worker has its database from its first statement on."""
    with suppress(OSError):  # it ends
        return any(os.readlink(each) == str(file) for each in Path(f"/proc/{pid}/fd").iterdir())
    return False
