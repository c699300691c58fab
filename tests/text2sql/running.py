"""Statements that take their time, and the worker processes that run them."""

import os
from pathlib import Path

COUNT_TO = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c {}) SELECT max(x) FROM c"
ENDLESS = COUNT_TO.format("")
HANG = "SELECT instr(zeroblob(9e6), zeroblob(1e5) || x'01')"  # one opcode of minutes, which no handler can interrupt


def children(parent=None):
    """Ids of the worker processes of ``parent`` (this process), zombies included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:
            continue
        if int(rest.split()[1]) == (parent or os.getpid()) and name.startswith("python"):
            found.append(int(stat.parent.name))
    return found


def is_running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
