"""Sequences as a forest: every distinct prefix is there once, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_stepwise.algo.tree import Nodes, build_tree, depth_first
from lit_stepwise.types import Segment, TokenTree

A, B, C, D, E = 70_000, 1, 256, 40, 50  # neither their bytes nor their digits are in the order of the numbers
TOKENS = st.sampled_from([B, D, C, A])  # few, so that prefixes collide
SEQUENCES = st.lists(
    st.tuples(st.sampled_from("xyz"), st.lists(TOKENS, min_size=1, max_size=7)), min_size=1, max_size=12
)


def built(sequences: list[tuple[str, list[int]]]) -> tuple[TokenTree, list[Nodes], Nodes]:
    return build_tree([np.array(tokens, np.int32) for _, tokens in sequences], [forest for forest, _ in sequences])


def ancestors(node: int, parents: Nodes) -> set[int]:
    """Itself included."""
    found = set()
    while node >= 0:
        found.add(node)
        node = int(parents[node])
    return found


def test_the_drawing_of_a_token_tree_is_what_is_built() -> None:
    tree, paths, parents = built([("x", [B, D, E, C]), ("x", [B, D, D])])
    assert tree.token_ids.tolist() == [B, D, D, E, C]
    assert tree.positions.tolist() == [0, 1, 2, 2, 3]
    assert tree.ends.tolist() == [5, 5, 3, 5, 5]
    assert tree.segments == [Segment(0, 2, 5, -1), Segment(2, 3, 3, 0), Segment(3, 5, 5, 0)]
    assert [path.tolist() for path in paths] == [[0, 1, 3, 4], [0, 1, 2]]
    assert parents.tolist() == [-1, 0, 1, 1, 3]


def test_tensors_of_a_tree_are_int64() -> None:
    tree, _, _ = built([("x", [A, B])])
    assert {each.dtype for each in (tree.token_ids, tree.positions, tree.ends)} == {torch.int64}


def test_sequences_are_met_in_lexicographic_order_forest_by_forest() -> None:
    sequences = [[C, D], [A], [B, D, E], [C], [B, D], [B]]
    order, shared = depth_first([np.array(each, np.int32) for each in sequences], [0, 0, 0, 0, 0, 1])
    assert order == [4, 2, 3, 0, 1, 5]
    assert shared == [0, 2, 0, 1, 0, 0]


def test_no_sequences_have_no_order() -> None:
    assert depth_first([], []) == ([], [])


@settings(deadline=None)
@given(SEQUENCES)
def test_a_node_is_a_prefix_of_a_forest(sequences: list[tuple[str, list[int]]]) -> None:
    tree, paths, _ = built(sequences)
    nodes: dict[tuple[str, tuple[int, ...]], int] = {}
    for (forest, tokens), path in zip(sequences, paths, strict=True):
        assert len(path) == len(tokens)
        for length, node in enumerate(path.tolist(), start=1):
            assert nodes.setdefault((forest, tuple(tokens[:length])), node) == node
    assert sorted(nodes.values()) == list(range(len(tree.ends)))


@settings(deadline=None)
@given(SEQUENCES)
def test_a_sequence_can_be_read_along_its_path(sequences: list[tuple[str, list[int]]]) -> None:
    tree, paths, parents = built(sequences)
    for (_, tokens), path in zip(sequences, paths, strict=True):
        assert tree.token_ids[path].tolist() == tokens
        assert tree.positions[path].tolist() == list(range(len(tokens)))
        assert parents[path].tolist() == [-1, *path[:-1]]


@settings(deadline=None)
@given(SEQUENCES)
def test_a_node_sees_its_ancestors_and_itself_alone(sequences: list[tuple[str, list[int]]]) -> None:
    tree, _, parents = built(sequences)
    for query in range(len(tree.ends)):
        seen = {key for key in range(len(tree.ends)) if key <= query < tree.ends[key]}
        assert seen == ancestors(query, parents)


@settings(deadline=None)
@given(SEQUENCES)
def test_segments_are_the_longest_chains_without_a_fork(sequences: list[tuple[str, list[int]]]) -> None:
    tree, _, parents = built(sequences)
    children = np.bincount(parents + 1, minlength=len(parents) + 1)[1:]
    assert [node for start, stop, *_ in tree.segments for node in range(start, stop)] == list(range(len(parents)))
    for start, stop, end, parent in tree.segments:
        assert parents[start + 1 : stop].tolist() == list(range(start, stop - 1))
        assert (children[start : stop - 1] == 1).all()
        assert children[stop - 1] != 1
        assert parents[start] == (tree.segments[parent].stop - 1 if parent >= 0 else -1)
        assert end == 1 + max(node for node in range(len(parents)) if start in ancestors(node, parents))


@pytest.mark.parametrize("sequences", [[[B]], [[B], [B]], [[B, C], [B]], [[B, C, D], [B, C], [B, C, D]]])
def test_what_only_goes_on_is_one_segment(sequences: list[list[int]]) -> None:
    tree, _, _ = built([("x", tokens) for tokens in sequences])
    length = max(map(len, sequences))
    assert tree.segments == [Segment(0, length, length, -1)]


def test_forests_of_equal_sequences_stand_side_by_side() -> None:
    tree, paths, _ = built([("x", [B, C]), ("y", [B, C]), ("x", [B, D])])
    assert tree.segments == [Segment(0, 1, 3, -1), Segment(1, 2, 2, 0), Segment(2, 3, 3, 0), Segment(3, 5, 5, -1)]
    assert [path.tolist() for path in paths] == [[0, 2], [3, 4], [0, 1]]
