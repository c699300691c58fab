"""Token sequences as a forest, in which every distinct prefix is computed once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from lit_stepwise.types import Segment, TokenTree

Ids = npt.NDArray[np.int32]
"""[L] Token ids of one sequence."""
Nodes = npt.NDArray[np.int64]
"""[L] For each token of a sequence its node in the tree."""


def depth_first(sequences: Sequence[Ids], forests: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """The order in which a walk through the tree meets the ends of the sequences, and what it need not walk again.

    Sequences of different ``forests`` share nothing. The rest is lexicographic order, which ``memcmp`` finds fast if
    token ids are written with the most significant byte first.

    Returns:
        order: [S] indices into ``sequences``.
        shared: [S] how many first tokens ``order[r]`` has in common with ``order[r - 1]``; 0 for the first.
    """
    numbers: dict[Hashable, int] = {}
    keys = [
        (numbers.setdefault(forest, len(numbers)), sequence.astype(">u4").tobytes())
        for sequence, forest in zip(sequences, forests, strict=True)
    ]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    shared = [0] * min(1, len(order))
    for before, after in pairwise(order):
        same_forest = keys[before][0] == keys[after][0]
        shared.append(_common_prefix(sequences[before], sequences[after]) if same_forest else 0)
    return order, shared


def build_tree(sequences: Sequence[Ids], forests: Sequence[Hashable]) -> tuple[TokenTree, list[Nodes], Nodes]:
    """Lay sequences into a forest, depth first.

    Args:
        sequences: of one token or more each.
        forests: one per sequence; those of different forests share nothing, whatever their tokens.

    Returns:
        The tree; of each sequence the nodes of its tokens; [T] the parent of every node, which predicts it, or -1.
    """
    order, shared = depth_first(sequences, forests)
    num_nodes = sum(len(sequences[i]) for i in order) - sum(shared)
    token_ids, positions, ends = (np.empty(num_nodes, np.int64) for _ in range(3))
    parents = np.arange(-1, num_nodes - 1)
    paths: list[Nodes] = [np.empty(0, np.int64)] * len(sequences)
    path, size = np.empty(0, np.int64), 0
    starts = set()
    for i, common in zip(order, shared, strict=True):
        if common < len(path) or not common:  # a fork or a new root; otherwise the last sequence goes on
            starts |= {size, int(path[common - 1]) + 1} if common else {size}
            parents[size : size + 1] = path[common - 1] if common else -1
        ends[path[common:]] = size
        new = np.arange(size, size + len(sequences[i]) - common)
        path = np.concatenate([path[:common], new])
        token_ids[new] = sequences[i][common:]
        positions[new] = np.arange(common, len(path))
        paths[i], size = path, size + len(new)
    ends[path] = size
    segments = _segments(sorted(starts), parents, ends)
    tree = TokenTree(torch.from_numpy(token_ids), torch.from_numpy(positions), torch.from_numpy(ends), segments)
    return tree, paths, parents


def _common_prefix(one: Ids, other: Ids) -> int:
    length = min(len(one), len(other))
    differing = one[:length] != other[:length]
    return int(differing.argmax()) if differing.any() else length


def _segments(starts: Sequence[int], parents: Nodes, ends: Nodes) -> list[Segment]:
    stops = [*starts[1:], len(ends)]
    holders = np.searchsorted(starts, parents[list(starts)], side="right") - 1
    return [
        Segment(start, stop, int(ends[start]), int(holder))
        for start, stop, holder in zip(starts, stops, holders, strict=True)
    ]
