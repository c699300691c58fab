"""Statements that take their time, and the worker processes that run them."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

COUNT_TO = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c {}) SELECT max(x) FROM c"
ENDLESS = COUNT_TO.format("")
HANG = "SELECT instr(zeroblob(9e6), zeroblob(1e5) || x'01')"  # one opcode of minutes, which no handler can interrupt


def children(parent=None):
    """Ids of the worker processes of ``parent`` (this process), zombies included, which have no command any more."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().split("(", 1)[1].rsplit(")", 1)
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        is_worker = name.startswith("python") and (b"_worker.py" in command or not command)
        if is_worker and int(rest.split()[1]) == (parent or os.getpid()):
            found.append(int(stat.parent.name))
    return found


def is_running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def run(coroutine):
    """``asyncio.run`` in a thread: a browser of other tests may have left a loop running in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
