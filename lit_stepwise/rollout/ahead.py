"""Play that runs ahead of training."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from lit_stepwise.rollout.threads import DaemonThreads

D = TypeVar("D")
T = TypeVar("T")


class Ahead(Generic[D, T]):
    """Plays iterations in a thread of its own, one after the other in the order in which they are started.

    Args:
        draw: what an iteration plays; asked when it is started and by whoever starts it, so that it hangs on no clock.
        play: plays that.
    """

    def __init__(self, draw: Callable[[int], D], play: Callable[[int, D], T]) -> None:
        self._draw = draw
        self._play = play
        self._thread = DaemonThreads(1, "play")
        self._iterations: dict[int, Future[T]] = {}

    def start(self, iteration: int) -> None:
        """Play it, once."""
        if iteration not in self._iterations:
            self._iterations[iteration] = self._thread.submit(self._play, iteration, self._draw(iteration))

    def take(self, iteration: int) -> T:
        """Wait for it. Raises what playing it raised."""
        self.start(iteration)
        return self._iterations.pop(iteration).result()

    def settle(self) -> None:
        """Wait until all that was started has been played."""
        wait(self._iterations.values())

    def drop(self) -> None:
        """Want nothing of what was started any more. It is played to its end: other ranks may count on this one."""
        self.settle()
        self._iterations.clear()

    def close(self, timeout: float) -> None:
        """Start nothing more, and wait so long for the iteration in play."""
        for future in self._iterations.values():
            future.cancel()
        wait(self._iterations.values(), timeout)
        self._thread.close()
