"""What a chart is: numbers, and the words that say how to read them. ``charts.js`` draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Color = str
"""``c0`` to ``c5`` tell apart, ``o0`` to ``o5`` rise in order, ``g0`` and ``g1`` stand back; see ``page.css``."""

SECTIONS = ("Learning", "Play", "Update", "Engine and trainer", "Time")
"""In the order of the page."""

MAX_POINTS = 400
"""Of a line; a longer one is averaged over equal spans of steps."""
MAX_BARS = 60


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or one layer of a stack of bars."""

    name: str
    color: Color
    points: Sequence[tuple[float, float]]
    """(x, y), by rising x; finite."""
    run: int = 0
    """Index of the run it is of."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A title, a sentence on how to read it, and series over one axis."""

    section: str
    title: str
    note: str
    unit: str
    """Of y; starting with % the numbers are fractions, and are shown times 100."""
    series: Sequence[Series] = field(default_factory=tuple)
    x: Literal["optimizer step", "iteration"] = "optimizer step"
    kind: Literal["lines", "stack"] = "lines"
    log: bool = False
    """The y axis is logarithmic; what is not positive is not drawn."""

    def packed(self) -> dict[str, Any]:
        """For the page."""
        series = [
            {
                "name": each.name,
                "color": each.color,
                "run": each.run,
                "x": [x for x, _ in each.points],
                "y": [float(f"{y:.6g}") for _, y in each.points],
            }
            for each in self.series
        ]
        names = ("section", "title", "note", "unit", "x", "kind", "log")
        return {name: getattr(self, name) for name in names} | {"series": series}


def overlay(charts: Sequence[Sequence[Chart]]) -> list[Chart]:
    """The charts of several runs as one list: lines of one title in one chart, stacks one after the other."""
    letters = "ABCDEFGH" if len(charts) > 1 else " "
    by_title: dict[str, Chart] = {}
    for run, of_run in enumerate(charts):
        for chart in of_run:
            series = [replace(each, name=f"{each.name} {letters[run]}".strip(), run=run) for each in chart.series]
            is_shared = chart.kind == "lines"
            title = chart.title if is_shared else f"{chart.title} {letters[run]}".strip()
            found = by_title.get(title)
            before = found.series if found is not None else ()
            by_title[title] = replace(chart, title=title, series=(*before, *series))
    return sorted(by_title.values(), key=lambda each: SECTIONS.index(each.section))


def ordered(lines: Mapping[str, Sequence[tuple[float, float]]], color: str = "o") -> list[Series]:
    """A series each, in the colours of one kind, from the first to the last."""
    last = 5 if color == "o" else len(lines) - 1
    step = last / max(len(lines) - 1, 1)
    return [Series(name, f"{color}{min(round(i * step), 5)}", points) for i, (name, points) in enumerate(lines.items())]
