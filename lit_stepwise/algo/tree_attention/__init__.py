"""Attention over the nodes of a ``TokenTree``: each sees those above it and itself, and nothing else."""

from lit_stepwise.algo.tree_attention.back_ends import Attend, AttentionName, BackEnd, back_end, chosen

__all__ = ["Attend", "AttentionName", "BackEnd", "back_end", "chosen"]
