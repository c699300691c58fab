"""The table behind a batch of the transformers engine: one row per request in play or played, as in its cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
"""A numpy array; a table of rows where it is indexed by the name of a field."""


def row_dtype(width: int) -> np.dtype[Any]:
    """One row: a request, with its prompt and response in ``tokens``, of which there are at most ``width``.

    ::

        tokens[:prompt]         the prompt
        tokens[prompt:length]   the response so far
        tokens[length:limit]    room for the rest of it
        tokens[:cached]         those whose keys and values the cache holds
        tokens[:reused]         those for which it held them when the request came

    ``logprobs``, ``versions`` of the weights that sampled and ``uniforms``, the random numbers that decide what is
    drawn, stand where their tokens stand, and mean nothing in the prompt. ``order`` counts the requests that were
    admitted before; ``stop`` is the number that ``Ends`` gave to the stop strings.
    """
    counts = [(name, "i8") for name in ("order", "prompt", "length", "limit", "cached", "reused", "stop")]
    settings = [("temperature", "f4"), ("top_p", "f4")]
    kinds = {"tokens": "i8", "logprobs": "f4", "versions": "i8", "uniforms": "f8"}
    return np.dtype([*counts, *settings, *((name, kind, (width,)) for name, kind in kinds.items())])


def shared_prefix(rows: Array, prompt: Array) -> Array:
    """[rows] Leading tokens of ``prompt`` that each row has computed."""
    differs = np.ones((len(rows), len(prompt) + 1), dtype=bool)
    differs[:, :-1] = rows["tokens"][:, : len(prompt)] != prompt
    shared: Array = np.minimum(differs.argmax(axis=1), rows["cached"])
    return shared


def chunks(todo: Array, first: int, last: int, max_tokens: int) -> Iterator[slice]:
    """Cut the rows ``first:last``, which are sorted by ``todo``, so that padded none has over ``max_tokens``.

    A row that alone has more stands alone; one with nothing to do stands in none.
    """
    first += int((todo[first:last] == 0).sum())
    while first < last:
        sizes = np.arange(1, last - first + 1) * todo[first:last]
        stop = first + max(1, int(np.searchsorted(sizes, max_tokens, side="right")))
        yield slice(first, stop)
        first = stop
