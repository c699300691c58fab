"""A pool of disposable worker processes: one that hangs is killed, one that dies is replaced."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from lit_stepwise.text2sql.sqlite_worker import HEADER, pack, unpack
from lit_stepwise.types import QueryResult

GRACE_SECONDS = 0.5  # beyond the timeout, for a worker to stop by itself before it is killed
START_SECONDS = 30.0  # for a worker to come up on a busy machine


class WorkerPool:
    """The workers of one executor, handed out first come, first served. Each starts when it is first needed."""

    def __init__(self, size: int, arguments: Sequence[str], system: str) -> None:
        """Start nothing yet.

        Args:
            size: Workers at a time.
            arguments: For Python to run the worker program, which speaks as ``sqlite_worker`` does.
            system: Name of the database system, for messages.
        """
        self.pid = os.getpid()
        self._arguments = arguments
        self._system = system
        self._lock = threading.Lock()
        self._alive: set[Worker] = set()
        self._idle: deque[Worker | None] = deque([None] * size)  # None: a place whose worker is yet to be started
        self._waiting: deque[Future[Worker | None]] = deque()
        self._num_closes = 0

    def run(self, request: dict[str, Any]) -> QueryResult:
        """The answer of the next free worker; one that overruns the request's ``timeout_seconds`` is killed."""
        try:
            return self._run(request)
        except CancelledError:
            return QueryResult("infra", error="the executor was closed")
        except OSError as error:
            return QueryResult("infra", error=f"a SQL worker could not be started: {error.strerror or error}")

    def close(self) -> None:
        """End the workers, and with them what is running. Idempotent; a later request starts new ones."""
        if self.pid != os.getpid():  # after a fork the lock may be held for ever by a thread that is not here
            return
        with self._lock:
            for worker in self._alive:
                worker.kill()
            for idle in self._idle:
                if idle is not None:  # the pipes of the others are being read; their readers close them
                    idle.close()
            self._alive.clear()
            self._idle = deque([None] * len(self._idle))
            self._num_closes += 1

    def _run(self, request: dict[str, Any]) -> QueryResult:
        num_closes = self._num_closes
        worker = self._take()
        try:
            worker = worker or self._start(num_closes)
            result = self._attempt(worker, request)
            if result is None:  # it may have died of something else, so a fresh one decides
                worker = self._start(num_closes)
                result = self._attempt(worker, request)
            return result or QueryResult(
                "limit", error=f"the statement needs too much memory, or crashed {self._system}"
            )
        finally:
            self._give(worker)

    def _attempt(self, worker: Worker, request: dict[str, Any]) -> QueryResult | None:
        """The result, or None when the worker died of the statement or otherwise."""
        start = time.monotonic()
        try:
            answer = worker.ask(request, request["timeout_seconds"] + GRACE_SECONDS)
        except (TimeoutError, EOFError) as error:
            seconds = time.monotonic() - start
            self._end(worker)
            if isinstance(error, TimeoutError) or seconds > request["timeout_seconds"]:
                return QueryResult("timeout", error="the statement took too long", seconds=seconds)
            return None
        except BaseException:  # the answer may still be on its way, and nobody else may read it
            self._end(worker)
            raise
        return QueryResult(
            status=answer["status"],
            columns=tuple(answer.get("columns", ())),
            rows=tuple(map(tuple, answer.get("rows", ()))),
            truncated=answer.get("truncated", False),
            error=answer.get("error", ""),
            seconds=time.monotonic() - start,
        )

    def _start(self, num_closes: int) -> Worker:
        """A new worker, unless ``close`` was called meanwhile."""
        with self._lock:  # so that close() misses no worker
            if num_closes != self._num_closes:
                raise CancelledError
            worker = Worker(self._arguments)
            self._alive.add(worker)
        try:
            worker.receive(time.monotonic() + START_SECONDS)
        except (TimeoutError, EOFError) as error:
            self._end(worker)
            raise OSError("it did not get ready") from error
        except BaseException:
            self._end(worker)
            raise
        return worker

    def _end(self, worker: Worker) -> None:
        """End a worker that this thread holds. Raises ``CancelledError`` when ``close`` did so before."""
        worker.close()
        with self._lock:
            if worker not in self._alive:
                raise CancelledError
            self._alive.remove(worker)

    def _take(self) -> Worker | None:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            turn: Future[Worker | None] = Future()
            self._waiting.append(turn)
        try:
            return turn.result()
        except BaseException:  # interrupted while waiting
            if not turn.cancel():
                self._give(turn.result())
            raise

    def _give(self, worker: Worker | None) -> None:
        with self._lock:
            if worker is not None and worker not in self._alive:
                worker.close()
                worker = None
            while self._waiting:
                turn = self._waiting.popleft()
                if turn.set_running_or_notify_cancel():
                    return turn.set_result(worker)
            if worker is None:
                self._idle.appendleft(None)
            else:
                self._idle.append(worker)  # and taken first, so that places stay empty while they can


class Worker:
    """One worker process and its pipes. Used by one thread at a time, except for ``kill``."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={},
            start_new_session=True,  # an interrupt from the terminal is for the trainer
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._input.fileno(), False)
        self._num_requests = 0

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to ``request``. Raises ``TimeoutError`` when it is late, ``EOFError`` when the worker is dead."""
        deadline = time.monotonic() + seconds
        self._num_requests += 1
        self._send(pack({"id": self._num_requests, **request}), deadline)
        answer = self.receive(deadline)
        if answer.get("id") != self._num_requests:
            raise EOFError("the worker answered another request")
        return answer

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message. Raises as ``ask`` does."""
        (length,) = HEADER.unpack(self._read(HEADER.size, deadline))
        try:
            return unpack(self._read(length, deadline))
        except ValueError as error:
            raise EOFError("the worker answered with something else than JSON") from error

    def kill(self) -> None:
        """End the process, from any thread; who reads from it sees the end of its answers."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process and close its pipes. Idempotent."""
        self.kill()
        self._input.close()
        self._output.close()

    def _send(self, data: bytes, deadline: float) -> None:
        while data:
            _wait(self._input.fileno(), select.POLLOUT, deadline)
            try:
                data = data[os.write(self._input.fileno(), data) :]
            except BrokenPipeError as error:
                raise EOFError("the worker is dead") from error

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            _wait(self._output.fileno(), select.POLLIN, deadline)
            chunk = os.read(self._output.fileno(), min(size - len(data), 1 << 16))
            if not chunk:
                raise EOFError("the worker is dead")
            data += chunk
        return bytes(data)


def _wait(file: int, event: int, deadline: float) -> None:
    poll = select.poll()  # select.select() knows no file number beyond 1023
    poll.register(file, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
