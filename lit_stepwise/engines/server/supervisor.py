"""Runs a command, and lets nothing of it outlive the process that asked for it. Needs the standard library alone.

    python -I -S supervisor.py PARENT_PID FOLDER[:FOLDER...] COMMAND [ARGUMENT ...]

It ends the command when the parent is gone or sends it SIGTERM, and whatever processes the command has left behind when
it ended by itself; then it removes the folders.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 0.1
TERMINATE_SECONDS = 5.0  # for the command to end by itself when asked to
TRACKER_SECONDS = 3.0  # for Python's resource tracker to remove shared memory, which it does when all others are gone
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> int:
    """Exit code of the command, as a shell would say it."""
    parent, folders, command = int(sys.argv[1]), sys.argv[2].split(":"), sys.argv[3:]
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.append(number))
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # for what the command leaves behind: not every init buries the dead
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_supervisor)
    while process.poll() is None and os.getppid() == parent and not asked:
        time.sleep(POLL_SECONDS)
    if process.poll() is None:
        process.terminate()
        _wait(lambda: process.poll() is not None, TERMINATE_SECONDS)
    _end_group(process.pid)
    code = process.wait()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code


def _end_group(group: int) -> None:
    for member in _members(group):
        if not _is_tracker(member):
            _kill(member)
    _wait(lambda: not _members(group), TRACKER_SECONDS)
    for member in _members(group):
        _kill(member)
    _wait(lambda: not _members(group), TRACKER_SECONDS)


def _members(group: int) -> list[int]:
    """Processes of the group that are not dead. Buries those that are, but for the first, whose exit code we want."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, process_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it is gone
            continue
        member = int(folder.name)
        if int(process_group) != group:
            continue
        if state not in "ZX":
            members.append(member)
        elif member != group:
            with suppress(ChildProcessError):
                os.waitpid(member, os.WNOHANG)
    return members


def _is_tracker(member: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{member}/cmdline").read_bytes()
    except OSError:
        return False


def _kill(member: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(member, signal.SIGKILL)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _die_with_supervisor() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
