"""What is going on in a run at this moment, and how it is shown."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lit_stepwise.training.clock import clock_time

WORDS = {
    "start": "starting engine",
    "sync": "syncing",
    "play": "playing",
    "wait": "waiting",
    "prepare": "preparing",
    "train": "training",
    "evaluate": "evaluating",
    "save": "saving",
    "other": "in between",
}
"""What is said of a phase of ``PhaseClock`` while it lasts."""


@dataclass(slots=True)
class Activity:
    """Something that takes a while, and how far it is."""

    label: str
    began: float
    """On the clock that ``left`` is asked with."""
    done: int = 0
    total: int = 0
    """0 where it cannot be counted."""
    first: int = 0
    """What was done before it began."""
    note: str = ""
    expected: float | None = None
    """Seconds that it takes by what is known; None where nothing is."""

    def left(self, now: float) -> float | None:
        """Seconds to go, never negative: what is missing to those expected, or as many for each as before."""
        expected = self.expected if self.expected is not None else self.in_proportion(now)
        return None if expected is None else max(0.0, expected - (now - self.began))

    def in_proportion(self, now: float) -> float | None:
        """Seconds that all of it takes if the rest goes on like what has been done; None where that cannot be said."""
        done = self.done - self.first
        return (now - self.began) * (self.total - self.first) / done if self.total and done else None

    def fraction(self, now: float) -> float:
        """How much of it is done, 0 to 1."""
        if self.total:
            return min(1.0, self.done / self.total)
        return min(1.0, (now - self.began) / self.expected) if self.expected else 0.0

    def count(self) -> str:
        """``37/128``; empty where there is nothing to count."""
        return f"{self.done}/{self.total}" if self.total else ""

    def text(self) -> str:
        """In words: ``playing 37/128, 8 executing``."""
        return ", ".join(filter(None, (f"{self.label} {self.count()}".rstrip(), self.note)))


def drawn(activities: Sequence[Activity], metrics: Mapping[str, str], now: float, width: int) -> list[str]:
    """A line for each of them, and one for the metrics, none wider than ``width``, with colours."""
    from rich.console import Console
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    console = Console(file=io.StringIO(), force_terminal=True, width=max(width, 20), legacy_windows=False)
    table = Table.grid(padding=(0, 1), expand=True)
    for ratio, justify in ((None, "left"), (1, "left"), (None, "right"), (None, "left"), (None, "right")):
        table.add_column(ratio=ratio, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for each in activities:
        left = each.left(now)
        times = clock_time(now - each.began) + (f", {clock_time(left)} left" if left is not None else "")
        table.add_row(each.label, ProgressBar(1.0, each.fraction(now)), each.count(), each.note, times)
    with console.capture() as captured:
        console.print(table)
        said = Text("  ".join(f"{name} {value}" for name, value in metrics.items()), style="bold")
        console.print(said, no_wrap=True, overflow="ellipsis")
    return [line for line in captured.get().split("\n") if line]


def in_order(metrics: Mapping[str, float]) -> dict[str, str]:
    """With three decimals, reward and accuracy first."""
    names = [*(name for name in ("reward", "accuracy") if name in metrics), *metrics]
    return {name: f"{metrics[name]:.3f}" for name in dict.fromkeys(names)}
