"""When two results are the same answer. Pure: results in, a bool out."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lit_stepwise.types import QueryResult

Row = tuple[Any, ...]

SKIPPED = r"--[^\n]* | /\*.*?(?:\*/|\Z) | '[^']*(?:'|\Z) | \"[^\"]*(?:\"|\Z) | `[^`]*(?:`|\Z) | \[[^\]]*(?:\]|\Z)"
"""Comments, strings and quoted names, left open at the end or not; ``'it''s'`` is two strings, which skips the same."""
TOKEN = re.compile(rf"{SKIPPED} | (?P<token>[\w$]+ | \S)", re.VERBOSE | re.DOTALL)

NOT_A_NUMBER = object()


def has_top_level_order_by(sql: str) -> bool:
    """Whether the rows of ``sql`` come in an order that it asks for.

    An ORDER BY within parentheses (a subquery, a CTE, a window, an aggregate) orders nothing outside of them, unless
    they enclose the whole statement.
    """
    depth, words = 0, []
    for match in TOKEN.finditer(sql):
        token = match["token"] or ""
        depth += (token == "(") - (token == ")")
        if token.strip("();"):
            words.append((depth, token.upper()))
    outer = min(words, default=(0, ""))[0]
    return ("ORDER", "BY") in pairwise(word for depth, word in words if depth == outer)


def results_match(predicted: QueryResult, gold: QueryResult, ordered: bool) -> bool:
    """Whether ``predicted`` answers what ``gold`` answers; never when one of them is not ok or is truncated.

    Rows form a bag, so that duplicates count, and their order counts only when ``ordered``. Columns are compared by
    position, their names are not. NULL equals NULL, nan equals nan, bytes differ from text. Integers (and booleans)
    equal each other exactly; a float equals a float or an integer that has the same 9 significant digits.
    """
    if any(result.status != "ok" or result.truncated for result in (predicted, gold)):
        return False
    if len(predicted.columns) != len(gold.columns) or len(predicted.rows) != len(gold.rows):
        return False
    if ordered:
        return all(_same_bag([row], [other]) for row, other in zip(predicted.rows, gold.rows, strict=True))
    return _same_bag(predicted.rows, gold.rows)


def _same_bag(predicted: Sequence[Row], gold: Sequence[Row]) -> bool:
    groups: defaultdict[Row, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
    for side, rows in enumerate((predicted, gold)):
        for row in rows:
            groups[tuple(map(_rounded, row))][side].append(row)
    return all(_same_integers(rows, others) for rows, others in groups.values())


def _same_integers(predicted: Sequence[Row], gold: Sequence[Row]) -> bool:
    """Whether as many rows on both sides, alike to 9 digits, agree exactly in the columns where none has a float."""
    has_float = [any(isinstance(value, float) for value in column) for column in zip(*predicted, *gold, strict=True)]

    def exact(row: Row) -> Row:
        return tuple(value for value, loose in zip(row, has_float, strict=True) if not loose)

    return Counter(map(exact, predicted)) == Counter(map(exact, gold))


def _rounded(value: Any) -> Any:
    if not isinstance(value, (int, float)):
        return value
    if value != value:
        return NOT_A_NUMBER
    try:
        return float(f"{value:.9g}")
    except OverflowError:  # an integer that no float can equal
        return value
