"""Log-probabilities of chosen tokens without ever holding all logits.

Ours, because each of those in libraries (torch's ``linear_cross_entropy``, Liger, cut cross-entropy) lacks something: a
temperature per row, differentiable entropies, results wider than bfloat16, or small gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS_AT_A_TIME = 4096
"""Of the head's gradient, where what is added to it takes memory."""


def entropy(logprobs: Tensor) -> Tensor:
    """[n] In nats, of the distributions whose [n, V] log-probabilities are given."""
    return -logprobs.exp().mul_(logprobs).sum(-1)


def likeliest(logprobs: Tensor) -> Tensor:
    """[n] The log-probability of the likeliest token, of [n, V]."""
    return logprobs.amax(-1)


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperatures: Tensor,
    chunk_tokens: int = 1024,
    entropy_gradient: bool = False,
    summary: Callable[[Tensor], Tensor] = entropy,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of the distribution it was drawn from.

    The backward pass computes the logits again. Each pass holds two [chunk, V] matrices of float32 at a time, and the
    backward pass the gradient of the head, which is summed over the chunks in float32.

    Args:
        hidden: [N, H] last hidden states at the positions that predict the targets.
        head: [V, H] output embedding.
        targets: [N] token ids.
        temperatures: [N] divide the logits; 0 (greedy) counts as 1, as engines report it.
        chunk_tokens: rows whose logits exist at a time.
        entropy_gradient: the entropies carry a gradient, too.
        summary: what to say of each distribution in place of its entropy, without a gradient; gets
            [n, V] log-probabilities whose memory is used again.

    Returns:
        logprobs [N] with gradient, entropies [N] without unless asked for, in nats; float32, or what is wider.
    """
    scales = temperatures.where(temperatures > 0, 1.0)
    differentiable = entropy_gradient and summary is entropy
    found: tuple[Tensor, Tensor] = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head, targets, scales, chunk_tokens, differentiable, summary
    )
    return found


class _TokenLogprobs(torch.autograd.Function):
    """Logits by chunks, in both passes."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        scales: Tensor,
        chunk_tokens: int,
        differentiable: bool,
        summary: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Of each row, keep only what normalises its probabilities."""
        ctx.dtype, ctx.chunk_tokens = _matmul_dtype(hidden, head), chunk_tokens
        wide = torch.promote_types(ctx.dtype, torch.float32)
        logprobs, summaries, normalisers = (hidden.new_empty(len(hidden), dtype=wide) for _ in range(3))
        for rows, logits in _scaled_logits(hidden.to(ctx.dtype), head.to(ctx.dtype), scales, chunk_tokens):
            normalisers[rows] = logits.logsumexp(-1)
            of_all_tokens = logits.sub_(normalisers[rows, None])
            logprobs[rows] = of_all_tokens.gather(-1, targets[rows, None]).squeeze(-1)
            summaries[rows] = summary(of_all_tokens)
        ctx.save_for_backward(hidden, head, targets, scales, normalisers, summaries)
        ctx.set_materialize_grads(False)
        if not differentiable:
            ctx.mark_non_differentiable(summaries)
        return logprobs, summaries

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of hidden and head, each where it is asked for."""
        hidden, head, targets, scales, normalisers, entropies = ctx.saved_tensors
        grad_targets = torch.zeros_like(normalisers) if grad_logprobs is None else grad_logprobs
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=normalisers.dtype) if ctx.needs_input_grad[1] else None
        states, weight = hidden.to(ctx.dtype), head.to(ctx.dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are chosen
            for rows, logits in _scaled_logits(states, weight, scales, ctx.chunk_tokens):
                of_all_tokens = logits.sub_(normalisers[rows, None])
                through_entropies = None if grad_entropies is None else (grad_entropies[rows], entropies[rows])
                gradient = _to_gradient(of_all_tokens, targets[rows], grad_targets[rows], through_entropies)
                grad_logits = gradient.div_(scales[rows, None]).to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad_logits @ weight
                if grad_head is not None:
                    _add_product(grad_head, grad_logits.T, states[rows])
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None, None, None, None, None


def _matmul_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    """What autocast would compute a linear layer in; it leaves float64 alone."""
    dtype, device = torch.promote_types(hidden.dtype, head.dtype), hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _scaled_logits(hidden: Tensor, head: Tensor, scales: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows and [n, V], their logits over the temperatures but for a constant of each row; always in the same memory."""
    num_rows, dtype = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
    memory = hidden.new_empty(min(chunk_tokens, num_rows), len(head), dtype=dtype)  # new pages cost a CPU much time
    for start in range(0, num_rows, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, num_rows))
        logits = memory[: rows.stop - start]
        if dtype == hidden.dtype:
            torch.mm(hidden[rows], head.T, out=logits)
        else:
            logits.copy_(hidden[rows] @ head.T)
        logits.div_(scales[rows, None])
        yield rows, logits.sub_(logits.amax(-1, keepdim=True))  # near 0, numbers are finer than near a logit of 40


def _to_gradient(
    logprobs: Tensor, targets: Tensor, grad_targets: Tensor, through_entropies: tuple[Tensor, Tensor] | None
) -> Tensor:
    """[n, V] Gradient of the logits behind these log-probabilities of all tokens, in the memory of the latter.

    For logits z, p = softmax(z), a target t and the entropy S = -sum(p log p):

        d log p[t] / dz = 1[t] - p        dS / dz = -p (log p + S)

    Args:
        logprobs: [n, V] log p
        targets: [n] t
        grad_targets: [n] of log p[t]
        through_entropies: [n] gradient of S, and S itself; None where no gradient comes through it.
    """
    if through_entropies is None:
        logprobs.exp_().mul_(-grad_targets[:, None])
    else:
        grad_entropies, entropies = through_entropies
        probabilities = logprobs.exp()
        logprobs.add_(entropies[:, None]).mul_(-grad_entropies[:, None]).sub_(grad_targets[:, None]).mul_(probabilities)
    logprobs[torch.arange(len(targets), device=targets.device), targets] += grad_targets
    return logprobs


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` in the dtype of ``total``."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:  # the product is never rounded, nor held
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # a CPU widens all of what it adds before it does
        for start in range(0, len(total), _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            total[rows].add_(left[rows] @ right)
