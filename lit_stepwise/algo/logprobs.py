"""Log-probabilities of chosen tokens without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def entropy(logprobs: Tensor) -> Tensor:
    """[n] In nats, of the distributions whose [n, V] log-probabilities are given."""
    return -(logprobs.exp() * logprobs).sum(-1)


def likeliest(logprobs: Tensor) -> Tensor:
    """[n] The log-probability of the likeliest token, of [n, V]."""
    return logprobs.amax(-1)


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperatures: Tensor,
    chunk_tokens: int = 2048,
    entropy_gradient: bool = False,
    summary: Callable[[Tensor], Tensor] = entropy,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of the distribution it was drawn from.

    Args:
        hidden: [N, H] last hidden states at the positions that predict the targets.
        head: [V, H] output embedding.
        targets: [N] token ids.
        temperatures: [N] divide the logits; 0 (greedy) counts as 1, as engines report it.
        chunk_tokens: rows of the [chunk, V] logits that exist at a time, in the backward pass too.
        entropy_gradient: the entropies carry a gradient, too.
        summary: what to say of each distribution in place of its entropy.

    Returns:
        logprobs [N] with gradient, entropies [N] without unless asked for, in nats; float32, or what is wider.
    """
    scales = temperatures.where(temperatures > 0, 1.0)
    if len(targets) <= chunk_tokens:
        return _chunk(hidden, head, targets, scales, entropy_gradient, summary)
    parts = [
        checkpoint(_chunk, h, head, t, s, entropy_gradient, summary, use_reentrant=False)
        for h, t, s in zip(*(torch.split(x, chunk_tokens) for x in (hidden, targets, scales)), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    scales: Tensor,
    entropy_gradient: bool,
    summary: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / scales[:, None]
    logprobs = logits.log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient):
        entropies = summary(logprobs)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropies
