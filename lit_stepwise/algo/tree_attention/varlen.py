"""Tree attention by one call of a flash kernel for sequences of many lengths: the fastest on a GPU."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_stepwise.algo.tree_attention.layout import cut, paths
from lit_stepwise.types import TokenTree

if TYPE_CHECKING:
    from lit_stepwise.algo.tree_attention.back_ends import Attend


def varlen(tree: TokenTree) -> Attend:
    """Each chain is a sequence whose queries are its own nodes and whose keys are those of its whole path.

    There are fewer queries than keys then, and the last query stands at the last key: such is the causal mask of flash
    attention, "bottom right" (arXiv:2307.08691, version 2.1).
    """
    from torch.nn.attention.varlen import varlen_attn  # loads the compiler of torch

    device = tree.ends.device
    chains, _ = cut(tree.segments)
    of_keys = paths(chains)
    num_queries, num_keys = [chain.stop - chain.start for chain in chains], [len(path) for path in of_keys]
    query_bounds, key_bounds = (
        torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device) for each in (num_queries, num_keys)
    )
    key_nodes = torch.from_numpy(np.concatenate(of_keys)).to(device)
    has_forks = len(key_nodes) > len(tree.ends)

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        queries, keys, values = (each[0].transpose(0, 1) for each in (query, key, value))
        if has_forks:
            keys, values = (_Gather.apply(each, key_nodes) for each in (keys, values))  # type: ignore[no-untyped-call]
        out = varlen_attn(
            queries, keys, values, query_bounds, key_bounds, max(num_queries), max(num_keys),
            scale=scale, window_size=(-1, 0), enable_gqa=True,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out[None].contiguous()

    return attend


class _Gather(torch.autograd.Function):
    """Rows by index. The gradients of a row that is taken often are summed in float32: bfloat16 would lose the last."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        """[T, H, D] and [K] -> [K, H, D]."""
        ctx.save_for_backward(index)
        ctx.shape = rows.shape
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[T, H, D]."""
        wide = torch.promote_types(grad.dtype, torch.float32)
        (index,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.shape, dtype=wide).index_add_(0, index, grad.to(wide))
        return total.to(grad.dtype), None
