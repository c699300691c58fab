"""What is put on the screen, and how it is made safe: a field may hold whatever a model or a database wrote."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Format = Literal["table", "csv", "json"]

_WIDTH_OF_A_PIPE = 140
_GAP = 2
"""Between columns."""
_LEAST = 8
"""Cells of a column, below which a table says nothing any more."""
_BARS = "▁▂▃▄▅▆▇█"
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories of characters that move the cursor, turn the direction of text, or cannot be seen."""


def screen() -> Console:
    """Prints to stdout and reads no markup."""
    width = None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE
    return Console(width=width, markup=False, emoji=False, highlight=False)


def safe(text: object) -> str:
    """The text with every character that is not just a letter on the screen written out, but for newlines and tabs."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in _HIDDEN else ascii(char)[1:-1] for char in str(text)
    )


def cell(value: Any) -> Text:
    """A value on one line; numbers to four digits."""
    if value is None:
        return Text("")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, float):
        return Text(number(value), justify="right")
    if isinstance(value, int):
        return Text(str(value), justify="right")
    return Text(" ".join(safe(value).split()))


def number(value: float) -> str:
    """To four digits; small ones with an exponent, and what is left of a rounding error is none."""
    return f"{value:.4g}" if abs(value) > 1e-15 or value != value else "0"


def table_of(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A row a line; where the screen is too narrow columns are cut. Of very many columns, a value a line."""
    lines = [[cell(value) for value in row] for row in rows]
    heads = [Text(safe(name)) for name in names]
    widths = [max(text.cell_len for text in column) for column in zip(heads, *lines, strict=True)]
    cut = _cut(widths, screen().width - _GAP * (len(widths) - 1))
    if cut is None:
        return _value_a_line(heads, lines)
    table = Table(box=None, pad_edge=False)
    for head, width in zip(heads, cut, strict=True):
        table.add_column(head, no_wrap=True, overflow="ellipsis", width=width)
    for line in lines:
        table.add_row(*line)
    return table


def _cut(widths: Sequence[int], room: int) -> list[int] | None:
    """Widths that fit: of the last column what the others leave, or else the widest are cut; None for too little."""
    *others, last = widths
    if (left := room - sum(others)) >= min(last, _LEAST // 2):
        return [*others, min(last, left)]
    most = max((most for most in range(room + 1) if sum(min(width, most) for width in widths) <= room), default=0)
    return [min(width, most) for width in widths] if most >= _LEAST else None


def _value_a_line(heads: Sequence[Text], lines: Iterable[Sequence[Text]]) -> Table:
    """For rows that no line can hold."""
    table = Table(box=None, pad_edge=False, show_header=False)
    name_width = min(max(head.cell_len for head in heads), 40)
    table.add_column(no_wrap=True, overflow="ellipsis", style="dim", width=name_width)
    table.add_column(no_wrap=True, overflow="ellipsis", width=max(screen().width - name_width - _GAP, 1))
    for number, line in enumerate(lines):
        table.add_row(Text(f"row {number}", "bold"), "")
        for head, value in zip(heads, line, strict=True):
            table.add_row(head, value.plain)
    return table


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """A bar a value, or of many the mean of as many as share one."""
    if not values:
        return ""
    size = min(width, len(values))
    edges = [len(values) * i // size for i in range(size + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1)) if span else 0] for mean in means)


def write(names: Sequence[str], rows: Sequence[Sequence[Any]], form: Format) -> None:
    """Rows to stdout, as they are; on a terminal CSV is made safe, and JSON always is ASCII."""
    if form == "json":
        keys = [f"{name}_{names[:i].count(name)}" if name in names[:i] else name for i, name in enumerate(names)]
        print(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1, default=str))
    elif form == "csv":
        import csv

        clean = safe if sys.stdout.isatty() else str
        writer = csv.writer(sys.stdout)
        writer.writerow(names)
        writer.writerows([["" if value is None else clean(value) for value in row] for row in rows])
    else:
        screen().print(table_of(names, rows))
