"""Tree attention by a kernel that torch compiles for the mask: on a GPU for any dtype."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_stepwise.types import TokenTree

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from lit_stepwise.algo.tree_attention.back_ends import Attend

_BLOCK = 128
"""Queries and keys of a block, of which the kernel passes over those that are all masked."""


def flex(tree: TokenTree) -> Attend:
    """Compiles for minutes where it is used first, then never again."""
    mask = block_mask(tree.ends)

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out: Tensor = _kernel()(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous()

    return attend


def block_mask(ends: Tensor) -> BlockMask:
    """What ``create_block_mask`` makes of the tree, without a mask for every pair of nodes.

    For i > j, some query of block i sees some key of block j if the largest end in j is past the first of i, and every
    one sees every one if the smallest end in j is past the last of i. Blocks with i = j are always partial.
    """
    from torch.nn.attention.flex_attention import BlockMask  # loads the compiler of torch

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < ends[key])

    of_block = pad(ends, (0, -len(ends) % _BLOCK)).view(-1, _BLOCK)
    first = torch.arange(len(of_block), device=ends.device)[:, None] * _BLOCK
    full = (first + _BLOCK <= of_block.amin(1)).tril(-1)
    some = (first < of_block.amax(1)).tril()
    return BlockMask.from_kv_blocks(
        *_listed(some & ~full), *_listed(full), BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(len(ends), len(ends))
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many are True in each row of [n, n], as [1, 1, n], and in which columns, as [1, 1, n, n], these first."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], columns.int()[None, None].contiguous()


@cache
def _kernel() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
