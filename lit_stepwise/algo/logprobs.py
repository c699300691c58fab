"""Log-probabilities of chosen tokens without ever holding all logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Tensor, head: Tensor, targets: Tensor, temperatures: Tensor, chunk_tokens: int = 2048
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of the distribution it was drawn from.

    Args:
        hidden: [N, H] last hidden states at the positions that predict the targets.
        head: [V, H] output embedding.
        targets: [N] token ids.
        temperatures: [N] divide the logits; 0 (greedy) counts as 1, as engines report it.
        chunk_tokens: rows of the [chunk, V] float32 logits that exist at a time, in the backward pass too.

    Returns:
        logprobs [N] float32 with gradient, entropies [N] float32 without, in nats.
    """
    scales = temperatures.where(temperatures > 0, 1.0)
    if len(targets) <= chunk_tokens:
        return _chunk(hidden, head, targets, scales)
    parts = [
        checkpoint(_chunk, h, head, t, s, use_reentrant=False)
        for h, t, s in zip(*(torch.split(x, chunk_tokens) for x in (hidden, targets, scales)), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk(hidden: Tensor, head: Tensor, targets: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, head).float() / scales[:, None]
    logprobs = logits.log_softmax(-1)
    with torch.no_grad():
        entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropies
