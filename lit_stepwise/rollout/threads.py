"""Threads for what may hang: nobody waits for them in the end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class DaemonThreads:
    """Runs functions, ``num_threads`` at a time. A ``ThreadPoolExecutor`` would wait for all of them at exit."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._name = name
        self._num_threads = num_threads
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run it as soon as a thread is free."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:  # whoever asks for the result gets it
                    future.set_exception(error)

        self._work.put(run)
        if len(self._threads) < self._num_threads:
            self._add_thread()
        return future

    def give_up(self, future: Future[Any]) -> None:
        """Nobody wants its result any more; the thread that it holds up, if it does, is replaced."""
        if not future.cancel() and not future.done():
            self._add_thread()

    def close(self) -> None:
        """Let the threads end when they have nothing left to do."""
        for _ in self._threads:
            self._work.put(None)

    def _add_thread(self) -> None:
        name = f"{self._name}-{len(self._threads)}"
        self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
        self._threads[-1].start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
