"""Attention over a tree, by every back-end, against plain causal attention over one sequence at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from lit_stepwise.algo.tree import Nodes, build_tree
from lit_stepwise.algo.tree_attention import Attend, AttentionName, back_end, back_ends, chosen, flex, segments, varlen
from lit_stepwise.algo.tree_attention.layout import Chain, Rectangle, cut, paths
from lit_stepwise.types import TokenTree

SCALE = 0.3
HEADS = [(4, 2), (3, 3), (6, 1)]  # of queries and of keys: groups, one each, one for all
SIZE = 5
SEEDS = range(8)
DRAWING = [[0, 1, 2], [0, 1, 3, 4], [0, 1, 3, 5]]
"""Nodes 0 1 2 3 4 5; segments 0 1 | 2 | 3 | 4 | 5."""


def built(sequences: Sequence[Sequence[int]]) -> tuple[TokenTree, list[Nodes]]:
    tree, of_sequences, _ = build_tree([np.array(each, np.int32) for each in sequences], [0] * len(sequences))
    return tree, of_sequences


def some_tree(seed: int, length: int = 12) -> tuple[TokenTree, list[Nodes]]:
    """Sequences over two tokens, some of which go on after others end."""
    draw = random.Random(seed)
    made = [draw.choices([1, 2], k=draw.randint(1, length)) for _ in range(draw.randint(2, 9))]
    return built([*made, made[0] + draw.choices([1, 2], k=length), [1] * (2 * length), [3]])


def states(
    num_nodes: int, heads: tuple[int, int], dtype: torch.dtype = torch.float64, size: int = SIZE
) -> tuple[list[Tensor], Tensor]:
    """Query, key and value in the memory layout of a model, and a gradient for the output."""
    generator = torch.Generator().manual_seed(num_nodes)
    drawn = [
        torch.randn(1, num_nodes, num, size, generator=generator, dtype=torch.float64).to(dtype)
        for num in (heads[0], heads[1], heads[1], heads[0])
    ]
    return [each.transpose(1, 2) for each in drawn[:3]], drawn[3]


def out_and_gradients(attend: Attend, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in inputs]
    out = attend(*leaves, SCALE)  # type: ignore[call-arg]
    return [out, *torch.autograd.grad(out, leaves, grad)]


def one_at_a_time(sequences: Sequence[Nodes]) -> Attend:
    """What a node puts out is that of the first sequence it is in; the others must put out the same."""

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out: dict[int, Tensor] = {}
        for path in sequences:
            of_sequence = (each[:, :, path] for each in (query, key, value))
            found = scaled_dot_product_attention(*of_sequence, is_causal=True, scale=scale, enable_gqa=True)
            for node, state in zip(path.tolist(), found.unbind(2), strict=True):
                torch.testing.assert_close(out.setdefault(node, state), state, rtol=0, atol=1e-12)
        return torch.stack([out[node] for node in sorted(out)], 1)

    return attend


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm()


def bottom_right(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    **options: Any,
) -> Tensor:
    """What a flash kernel for sequences of many lengths does: the last query of each stands at its last key."""
    assert options == {"scale": SCALE, "window_size": (-1, 0), "enable_gqa": True}
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    num_queries, num_keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (cu_seq_q[0], cu_seq_k[0], max_q, max_k) == (0, 0, max(num_queries), max(num_keys))
    outs = []
    for queries, keys, values in zip(query.split(num_queries), key.split(num_keys), value.split(num_keys), strict=True):
        mask = torch.ones(len(queries), len(keys), dtype=torch.bool).tril(len(keys) - len(queries))
        of_sequence = (each.transpose(0, 1)[None] for each in (queries, keys, values))
        out = scaled_dot_product_attention(*of_sequence, attn_mask=mask, scale=SCALE, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.empty_like(query).copy_(torch.cat(outs))  # with the strides of the query


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of a GPU on a CPU."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", bottom_right)
    monkeypatch.setattr(flex, "_kernel", lambda: flex_attention.flex_attention)


@pytest.fixture
def small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_MAX_TRIANGLE", 3)
    monkeypatch.setattr(segments, "_MAX_QUERIES", 4)


# what kernels for plain sequences can compute


def test_the_drawing_of_a_cut_tree_is_what_is_cut() -> None:
    chains, rectangles = cut(built(DRAWING)[0].segments)
    assert chains == [Chain(0, 3, -1), Chain(3, 5, 1), Chain(5, 6, 3)]
    assert rectangles == [Rectangle(slice(3, 6), slice(0, 2)), Rectangle(slice(5, 6), slice(3, 4))]
    assert [path.tolist() for path in paths(chains)] == DRAWING


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_each_pair_of_nodes_that_see_each_other_is_in_one_part_of_the_cut(seed: int) -> None:
    tree, _ = some_tree(seed)
    nodes = torch.arange(len(tree.ends))
    chains, rectangles = cut(tree.segments)
    covered = torch.zeros(len(nodes), len(nodes), dtype=torch.int64)
    for start, stop, _ in chains:
        covered[start:stop, start:stop] += torch.ones(stop - start, stop - start, dtype=torch.int64).tril()
    for queries, keys in rectangles:
        assert covered[queries, keys].numel() > 0
        covered[queries, keys] += 1
    assert covered.tolist() == ((nodes <= nodes[:, None]) & (nodes[:, None] < tree.ends)).long().tolist()


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_the_path_of_a_chain_leads_from_its_root_to_its_leaf(seed: int) -> None:
    tree, _ = some_tree(seed)
    chains, _ = cut(tree.segments)
    for chain, path in zip(chains, paths(chains), strict=True):
        leaf = chain.stop - 1
        assert path.tolist() == [node for node in range(leaf + 1) if leaf < tree.ends[node]]
        assert chain.parent == ([-1, *path.tolist()])[len(path) - (chain.stop - chain.start)]


# every back-end


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["segments", "varlen", "dense"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_tree_is_computed_as_its_sequences_are_one_at_a_time(
    name: AttentionName, heads: tuple[int, int], seed: int
) -> None:
    tree, sequences = some_tree(seed)
    inputs, grad = states(len(tree.ends), heads)
    expected = out_and_gradients(one_at_a_time(sequences), inputs, grad)
    assert_equal(out_and_gradients(back_end(name)(tree), inputs, grad), expected, 1e-12)


@pytest.mark.usefixtures("small_calls")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("seed", SEEDS)
def test_how_the_calls_are_cut_changes_nothing(heads: tuple[int, int], seed: int) -> None:
    tree, sequences = some_tree(seed, length=30)
    inputs, grad = states(len(tree.ends), heads)
    expected = out_and_gradients(one_at_a_time(sequences), inputs, grad)
    assert_equal(out_and_gradients(back_end("segments")(tree), inputs, grad), expected, 1e-12)


@pytest.mark.usefixtures("emulated")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", [12, 150])
def test_flex_puts_out_what_dense_does(heads: tuple[int, int], length: int) -> None:
    tree, _ = some_tree(2, length)
    inputs, _ = states(len(tree.ends), heads, size=16)
    expected = back_end("dense")(tree)(*inputs, SCALE)  # type: ignore[call-arg]
    assert_equal([back_end("flex")(tree)(*inputs, SCALE)], [expected], 1e-12)  # type: ignore[call-arg]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["segments", "varlen", "dense"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_narrow_dtypes_are_exact_to_their_last_bits(name: AttentionName, dtype: torch.dtype, tolerance: float) -> None:
    tree, _ = some_tree(1, length=30)
    inputs, grad = states(len(tree.ends), (4, 2), dtype, size=16)
    expected = out_and_gradients(back_end("dense")(tree), [each.double() for each in inputs], grad.double())
    found = out_and_gradients(back_end(name)(tree), inputs, grad)
    assert {each.dtype for each in found} == {dtype}
    assert_equal([each.double() for each in found], expected, tolerance)


@pytest.mark.usefixtures("emulated")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["segments", "varlen", "dense", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_laid_out_as_models_want_them(name: AttentionName, dtype: torch.dtype) -> None:
    tree, _ = some_tree(0)
    (query, key, value), _ = states(len(tree.ends), (4, 2), dtype, size=16)
    out = back_end(name)(tree)(query, key, value, SCALE)
    assert out.shape == (1, len(tree.ends), 4, 16)
    assert out.is_contiguous()
    assert out.dtype == dtype


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["segments", "varlen", "dense"])
@pytest.mark.parametrize("layout", [lambda x: x.contiguous(), lambda x: x.mT.contiguous().mT], ids=["heads", "columns"])
def test_the_memory_layout_of_states_changes_nothing(name: AttentionName, layout: Any) -> None:
    tree, sequences = some_tree(3)
    inputs, grad = states(len(tree.ends), (4, 2))
    expected = out_and_gradients(one_at_a_time(sequences), inputs, grad)
    found = out_and_gradients(back_end(name)(tree), [layout(each) for each in inputs], layout(grad))
    assert_equal(found, expected, 1e-12)
    assert found[0].is_contiguous()


@pytest.mark.parametrize("name", ["segments", "dense"])
def test_the_gradient_of_a_plain_sum_has_no_memory_of_its_own(name: AttentionName) -> None:
    tree, sequences = some_tree(4)
    inputs, grad = states(len(tree.ends), (4, 2))
    expected = out_and_gradients(one_at_a_time(sequences), inputs, torch.ones_like(grad))
    stretched = torch.ones((), dtype=torch.float64).expand(grad.shape)
    assert_equal(out_and_gradients(back_end(name)(tree), inputs, stretched), expected, 1e-12)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["segments", "varlen", "dense"])
def test_one_preparation_serves_all_layers(name: AttentionName) -> None:
    tree, sequences = some_tree(5)
    attend = back_end(name)(tree)
    for heads in HEADS:
        inputs, grad = states(len(tree.ends), heads)
        expected = out_and_gradients(one_at_a_time(sequences), inputs, grad)
        assert_equal(out_and_gradients(attend, inputs, grad), expected, 1e-12)


# each in its own way


def test_a_sum_over_many_descendants_in_bfloat16_is_a_sum_in_float32() -> None:
    tree, _ = built([[7, 8, 10 + i, 1, 2, 3] for i in range(1600)])
    inputs, grad = states(len(tree.ends), (8, 1), torch.bfloat16, size=16)
    grad = grad + 1  # sums that grow, and lose the last bits of what is added
    expected = out_and_gradients(back_end("segments")(tree), [each.double() for each in inputs], grad.double())
    found = out_and_gradients(back_end("segments")(tree), inputs, grad)
    for one, other in zip(found[2:], expected[2:], strict=True):
        of_trunk, exact = one[:, :, :2].double(), other[:, :, :2]
        assert (of_trunk - exact).norm() < 2.4e-3 * exact.norm()


class Added(TorchDispatchMode):
    """Notes the dtypes of what is added up."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.index_add_.default:
            self.dtypes += [args[0].dtype, args[3].dtype]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "sums"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_rows_taken_often_add_up_their_gradient_in_float32(dtype: torch.dtype, sums: torch.dtype) -> None:
    rows = torch.zeros(2, 1, 3, dtype=dtype, requires_grad=True)
    taken = varlen._Gather.apply(rows, torch.tensor([1, 0, 1, 1]))
    with Added() as added:  # a GPU adds one by one, and 256 + 1 = 256 in bfloat16
        (gradient,) = torch.autograd.grad(taken, rows, torch.ones_like(taken))
    assert gradient.tolist() == [[[1.0] * 3], [[3.0] * 3]]
    assert gradient.dtype == dtype
    assert added.dtypes == [sums, sums]


def test_varlen_takes_the_keys_of_whole_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda *args, **_: seen.extend(args) or args[0])
    (query, key, value), _ = states(6, (1, 1))
    back_end("varlen")(built(DRAWING)[0])(query, key, value, SCALE)
    of_paths = [0, 1, 2, 0, 1, 3, 4, 0, 1, 3, 5]
    assert torch.equal(seen[0], query[0].transpose(0, 1))
    assert torch.equal(seen[1], key[0, :, of_paths].transpose(0, 1))
    assert torch.equal(seen[2], value[0, :, of_paths].transpose(0, 1))
    assert [each.tolist() for each in seen[3:5]] == [[0, 3, 5, 6], [0, 3, 7, 11]]
    assert seen[5:] == [3, 4]


def test_varlen_copies_nothing_where_nothing_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda *args, **_: seen.extend(args) or args[0])
    (query, key, value), _ = states(5, (1, 1))
    back_end("varlen")(built([[1, 2], [3, 4, 5]])[0])(query, key, value, SCALE)
    assert [each.data_ptr() for each in seen[:3]] == [query.data_ptr(), key.data_ptr(), value.data_ptr()]
    assert [each.tolist() for each in seen[3:5]] == [[0, 2, 5], [0, 2, 5]]


def listed(num_blocks: Tensor, columns: Tensor) -> list[list[int]]:
    """For each row the columns of its blocks."""
    pairs = zip(num_blocks[0, 0].tolist(), columns[0, 0].tolist(), strict=True)
    return [row[:num] for num, row in pairs]


@pytest.mark.parametrize("sequences", [
    [[1] * 700],  # every block below the diagonal is full
    [[1] * 128 + [2] * 256, [1] * 128 + [3] * 130],  # forks at the edge of blocks
    [[1] * 127 + [2] * 129, [1] * 127 + [3] * 128],  # and one node before
    [[i] * 100 for i in range(9)],
    [[1] * i + [2] * 40 for i in range(0, 300, 31)],
    [[1] * 300 + [i] * 90 for i in range(2, 8)],
    [[1]],
    [[1] * 128],
    [[1] * 129],
])  # fmt: skip
def test_a_block_mask_is_that_of_all_pairs(sequences: list[list[int]]) -> None:
    tree, _ = built(sequences)
    num_nodes, ends = len(tree.ends), tree.ends
    found = flex.block_mask(ends)
    expected = flex_attention.create_block_mask(
        lambda b, h, q, k: (k <= q) & (q < ends[k]), None, None, num_nodes, num_nodes, device="cpu"
    )
    assert found.shape == expected.shape
    assert found.BLOCK_SIZE == expected.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        one, other = (
            [getattr(mask, f"{kind}_{what}") for what in ("num_blocks", "indices")] for mask in (found, expected)
        )
        assert listed(*one) == listed(*other)
        assert [each.dtype for each in one] == [torch.int32] * 2
    nodes = torch.arange(num_nodes)
    seen = found.mask_mod(torch.tensor(0), torch.tensor(0), nodes[:, None], nodes[None])
    assert torch.equal(seen, (nodes <= nodes[:, None]) & (nodes[:, None] < ends))


# which of them


@pytest.mark.parametrize(("device", "dtype", "expected"), [
    ("cpu", torch.bfloat16, "segments"),
    ("cpu", torch.float64, "segments"),
    ("cuda", torch.bfloat16, "varlen"),
    ("cuda", torch.float16, "varlen"),
    ("cuda", torch.float32, "flex"),
    ("mps", torch.float16, "dense"),
])  # fmt: skip
def test_auto_goes_by_device_and_dtype(device: str, dtype: torch.dtype, expected: AttentionName) -> None:
    assert chosen("auto", torch.device(device), dtype) == expected


def test_a_name_that_is_given_stands() -> None:
    assert chosen("dense", torch.device("cuda"), torch.float16) == "dense"


def test_auto_prepares_what_it_needs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[str] = []

    def noted(name: AttentionName) -> Any:
        original = back_end(name)
        return lambda tree: prepared.append(name) or original(tree)

    tree, _ = some_tree(6)
    noting = {name: noted(name) for name in ("segments", "dense", "varlen", "flex")}
    monkeypatch.setattr(back_ends, "_BACK_ENDS", noting)
    attend = back_end("auto")(tree)
    assert prepared == []
    (query, key, value), _ = states(len(tree.ends), (4, 2))
    outs = [attend(query, key, value, SCALE) for _ in range(2)]
    assert prepared == ["segments"]
    monkeypatch.undo()
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], back_end("segments")(tree)(query, key, value, SCALE))
