"""Tree attention by the flash kernels of torch for a CPU, which know no masks but the causal one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_stepwise.algo.tree_attention.layout import cut
from lit_stepwise.types import TokenTree

if TYPE_CHECKING:
    from lit_stepwise.algo.tree_attention.back_ends import Attend

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_MAX_TRIANGLE = 128
"""Nodes of a causal call, but in half precision, where small calls are slow: of 512 keys the kernel skips none."""
_MAX_QUERIES = 1024
"""Of a call that is not causal: the kernel sums gradients in the dtype of its inputs, we do in float32."""

_Rows = tuple[EllipsisType, slice, slice]
"""Nodes out of [..., T, *]."""


class _Block(NamedTuple):
    queries: _Rows
    keys: _Rows
    causal: bool


def segments(tree: TokenTree) -> Attend:
    """The triangles and rectangles of ``cut``, each of which is a call on slices; nothing is gathered."""
    whole, halved = ([*_blocks(tree, max_triangle)] for max_triangle in (len(tree.ends), _MAX_TRIANGLE))

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        blocks = whole if query.dtype.itemsize == 2 else halved
        queries = query[0].view(key.shape[1], -1, *query.shape[2:])
        out: Tensor = _Attention.apply(queries, key[0], value[0], blocks, scale)  # type: ignore[no-untyped-call]
        return out.flatten(0, 1).transpose(0, 1)[None]

    return attend


def _blocks(tree: TokenTree, max_triangle: int) -> Iterator[_Block]:
    """Each node is in one causal block, which comes before all others that it is in."""
    chains, rectangles = cut(tree.segments)
    for chain in chains:
        yield from _triangle(chain.start, chain.stop, max_triangle)
    for queries, keys in rectangles:
        for start in range(queries.start, queries.stop, _MAX_QUERIES):
            stop = min(start + _MAX_QUERIES, queries.stop)
            yield _Block(_rows(start, stop), _rows(keys.start, keys.stop), causal=False)


def _triangle(start: int, stop: int, max_triangle: int) -> Iterator[_Block]:
    if stop - start <= max_triangle:
        yield _Block(_rows(start, stop), _rows(start, stop), causal=True)
    else:
        middle = (start + stop) // 2
        yield from _triangle(start, middle, max_triangle)
        yield from _triangle(middle, stop, max_triangle)
        yield _Block(_rows(middle, stop), _rows(start, middle), causal=False)


def _rows(start: int, stop: int) -> _Rows:
    return ..., slice(start, stop), slice(None)


class _Attention(torch.autograd.Function):
    """The softmax of a query over all of its keys, from those over the keys of each block (arXiv:2310.01889).

    With the output and the log-sum-exp over all keys in place of those over the keys of a block, the backward pass of
    flash attention over that block gives the share that it has in each gradient.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[_Block], scale: float) -> Tensor:
        """[Hkv, G, T, D] for G query heads per key head, [Hkv, T, D] twice -> [Hkv, G, T, D], nodes first in memory."""
        query, key, value = (_readable(each) for each in (query, key, value))
        keys, values = (each[:, None].expand_as(query) for each in (key, value))
        wide = torch.promote_types(query.dtype, torch.float32)
        out, lse = _nodes_first(query, wide), query.new_empty(*query.shape[:-1], 1, dtype=wide)
        for rows, columns, causal in blocks:
            found, found_lse = _FORWARD(query[rows], keys[columns], values[columns], 0.0, causal, scale=scale)
            found_lse = found_lse[..., None]
            if causal:
                out[rows], lse[rows] = found, found_lse
            else:
                so_far = lse[rows]
                out[rows].lerp_(found.to(wide), (found_lse - so_far).sigmoid())
                lse[rows] = so_far.logaddexp(found_lse)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Summed over blocks and query heads in float32, or what is wider."""
        query, key, value, out, lse = ctx.saved_tensors
        keys, values = (each[:, None].expand_as(query) for each in (key, value))
        totals = [_nodes_first(each, lse.dtype) for each in (query, key, value)]
        for rows, columns, causal in ctx.blocks:
            shares = _BACKWARD(
                grad[rows], query[rows], keys[columns], values[columns], out[rows], lse[rows].squeeze(-1), 0.0, causal,
                scale=ctx.scale,
            )  # fmt: skip
            of_query, of_key, of_value = shares[0], *(each.sum(1, dtype=lse.dtype) for each in shares[1:])
            for total, nodes, share in zip(totals, (rows, columns, columns), (of_query, of_key, of_value), strict=True):
                if causal:
                    total[nodes] = share
                else:
                    total[nodes] += share
        return *(each.to(query.dtype) for each in totals), None, None


def _readable(states: Tensor) -> Tensor:
    """[..., D] The kernels take any strides but want the numbers of a row side by side."""
    return states if states.stride(-1) == 1 else states.contiguous()


def _nodes_first(like: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., T, D] In memory T comes first, as in the states of a language model; holds what was there."""
    return like.new_empty(like.movedim(-2, 0).shape, dtype=dtype).movedim(0, -2)
