"""A tree cut into what kernels for plain sequences can compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lit_stepwise.algo.tree import Nodes
from lit_stepwise.types import Segment


class Chain(NamedTuple):
    """A way down to a leaf, first child after first child, whose nodes therefore stand side by side."""

    start: int
    stop: int
    parent: int
    """The node that it hangs below; -1 for a root."""


class Rectangle(NamedTuple):
    """Nodes of which each sees all of the keys."""

    queries: slice
    keys: slice


def cut(segments: Sequence[Segment]) -> tuple[list[Chain], list[Rectangle]]:
    """Cut the pairs of nodes that see each other into the triangles of chains and rectangles, of which no two overlap.

    ::

        nodes a b c d e f      sequences  a b c, a b d e, a b d f      segments  a b | c | d | e | f

        chains      a b c           triangles  a              rectangles  d e f see a b
                    d e                        a b                            f sees d
                    f                          a b c
    """
    chains, rectangles, first = [], [], 0
    for i, segment in enumerate(segments):
        start, parent = segments[first].start, segments[first].parent
        if segment.end == segment.stop:  # a leaf
            chains.append(Chain(start, segment.stop, segments[parent].stop - 1 if parent >= 0 else -1))
            first = i + 1
        else:
            after_first_child = segments[i + 1].end
            rectangles.append(Rectangle(slice(after_first_child, segment.end), slice(start, segment.stop)))
    return chains, rectangles


def paths(chains: Sequence[Chain]) -> list[Nodes]:
    """For each chain all nodes from its root to its leaf."""
    found, path = [], np.empty(0, np.int64)
    for start, stop, parent in chains:
        above = path[: np.searchsorted(path, parent, side="right")]  # depth first: the last path led past the parent
        path = np.concatenate([above, np.arange(start, stop)])
        found.append(path)
    return found
