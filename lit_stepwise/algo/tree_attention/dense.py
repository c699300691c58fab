"""Tree attention with a mask for every pair of nodes: the reference, for any device and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lit_stepwise.types import TokenTree

if TYPE_CHECKING:
    from lit_stepwise.algo.tree_attention.back_ends import Attend


def dense(tree: TokenTree) -> Attend:
    """Memory and time grow with the square of the number of nodes."""
    nodes = torch.arange(len(tree.ends), device=tree.ends.device)
    mask = (nodes <= nodes[:, None]) & (nodes[:, None] < tree.ends)

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous()

    return attend
