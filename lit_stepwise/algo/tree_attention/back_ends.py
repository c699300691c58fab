"""Which kernel computes attention over a tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from lit_stepwise.algo.tree_attention.dense import dense
from lit_stepwise.algo.tree_attention.flex import flex
from lit_stepwise.algo.tree_attention.segments import segments
from lit_stepwise.algo.tree_attention.varlen import varlen
from lit_stepwise.types import TokenTree

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Query [1, Hq, T, D], key and value [1, Hkv, T, D] and the scale of the scores -> [1, T, Hq, D], contiguous.

Hq is a multiple of Hkv: query head h reads head h // (Hq / Hkv) of key and value (arXiv:2305.13245).
"""
BackEnd = Callable[[TokenTree], Attend]
"""Prepares a tree, which is on the device of its queries; once for all layers, forward and backward."""
AttentionName = Literal["auto", "varlen", "flex", "segments", "dense"]
"""``auto`` takes the fastest that fits device and dtype of the query; ``dense`` works everywhere, and is slow."""

_BACK_ENDS: Mapping[AttentionName, BackEnd] = {"varlen": varlen, "flex": flex, "segments": segments, "dense": dense}


def back_end(name: AttentionName) -> BackEnd:
    """The one of that name; ``auto`` decides when it sees the first query."""
    return _BACK_ENDS.get(name, _auto)


def chosen(name: AttentionName, device: torch.device, dtype: torch.dtype) -> AttentionName:
    """The name itself, or what ``auto`` comes to for queries of ``dtype`` on ``device``."""
    if name != "auto":
        return name
    match device.type:
        case "cpu":
            return "segments"
        case "cuda":
            return "varlen" if dtype in (torch.bfloat16, torch.float16) else "flex"
        case _:
            return "dense"


def _auto(tree: TokenTree) -> Attend:
    prepared: dict[AttentionName, Attend] = {}

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        name = chosen("auto", query.device, query.dtype)
        if name not in prepared:
            prepared[name] = _BACK_ENDS[name](tree)
        return prepared[name](query, key, value, scale)

    return attend
