"""An interpreter that has imported already what every run imports, and forks one for each run.

Of a run of a tiny model most seconds go into imports, and they are the same each time. What is started here is the same
script with the same arguments, environment and working directory, in a process of its own that ends as any other does.
One thing is not as there: all have the same seed for hashes of text, so whether the order of a set decides anything is
for those tests that start real ones (tests/e2e/test_kills.py, ranks beyond the first).
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from select import select
from typing import Any


class WarmPython:
    """What a test holds of it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def start(
        self, script: Path, words: Sequence[str], folder: Path, environment: Mapping[str, str], out: Path, err: Path
    ) -> int:
        """Run a script as ``python SCRIPT WORDS...`` would; return the id of its process.

        Args:
            script: File of Python.
            words: Its arguments.
            folder: Its working directory.
            environment: All of it.
            out: File for what it prints.
            err: File for its errors, which may be the same.
        """
        self._send([[str(script), *words], str(folder), dict(environment), str(out), str(err)])
        return self._receive()

    def wait(self, processes: Sequence[int], seconds: float) -> list[int]:
        """Their exit codes, negative for a signal. When one takes longer all are killed, and the test fails."""
        deadline, in_time, codes = time.monotonic() + seconds, True, []
        for process in processes:
            self._send(process)
            if not select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                in_time = False
                for each in processes[len(codes) :]:
                    os.kill(each, signal.SIGKILL)
            codes.append(self._receive())
        assert in_time, f"not ended within {seconds} s"
        return codes

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    def _receive(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def serve() -> list[str] | None:
    """Start and wait as asked; None at the end, and in a process that was started the command that it has to run."""
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        elif (answer := os.fork()) == 0:
            return become(*request)
        print(answer, flush=True)
    return None


def become(command: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> list[str]:
    """Take on all that a process of its own would have been started with."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate((os.devnull, out, err)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        file = os.open(path, flags, 0o644)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.path[0] = os.path.dirname(command[0])
    return command


if __name__ == "__main__":
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import lit_stepwise.commands  # noqa: F401

    if (command := serve()) is not None:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
