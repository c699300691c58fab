"""How the transformers engine draws the next tokens, and how it sees that a response has come to its end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_stepwise.engines.rows import Array
from lit_stepwise.errors import EngineError


def sample(logits: Tensor, temperature: Array, top_p: Array, uniforms: Array) -> tuple[Array, Array]:
    """Invert each row's distribution function [n, V] at its uniform number: the tokens, and their logprobs."""
    heat = torch.from_numpy(temperature).to(logits.device)[:, None]
    logprobs = (logits / heat.where(heat > 0, 1)).log_softmax(-1)
    if ((top_p < 1) & (temperature > 0)).any():
        mass = torch.from_numpy(np.where(temperature > 0, top_p, 1)).to(logits.device)[:, None]
        logprobs = _nucleus(logprobs, mass)
    distribution = logprobs.double().exp().cumsum(-1)
    drawn = torch.from_numpy(uniforms).to(logits.device)[:, None] * distribution[:, -1:]
    # the first place that lies above the number has a probability, so a token outside the nucleus is never drawn
    tokens = torch.searchsorted(distribution, drawn, right=True).clamp(max=logits.shape[-1] - 1)
    tokens = tokens.where(heat > 0, logits.argmax(-1, keepdim=True))
    chosen = logprobs.gather(-1, tokens)
    if not chosen.isfinite().all():
        raise EngineError("the model's logits are not finite; its weights have diverged")
    return tokens[:, 0].cpu().numpy(), chosen[:, 0].cpu().numpy()


def _nucleus(logprobs: Tensor, mass: Tensor) -> Tensor:
    """Keep the likeliest tokens until they hold ``mass`` [n, 1], and renormalise."""
    ordered, order = logprobs.sort(descending=True, stable=True)
    probabilities = ordered.exp()
    outside = (probabilities.cumsum(-1) - probabilities >= mass) & (mass < 1)
    return logprobs.masked_fill(outside.scatter(-1, order, outside), -torch.inf).log_softmax(-1)


class Ends:
    """Says which responses ended with their newest token."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self._tokenizer = tokenizer
        self._eos = np.zeros(model.config.get_text_config().vocab_size, dtype=bool)
        configured = model.generation_config.eos_token_id
        ids = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
        self._eos[[token for token in ids if token is not None]] = True
        self._stops: list[tuple[str, ...]] = []
        self._suspects = np.zeros((0, len(self._eos)), dtype=bool)
        """[stops, vocabulary] Tokens that can be the last of a stop string: only after them is any text decoded."""

    def index(self, stop: tuple[str, ...]) -> int:
        """A number for these stop strings."""
        if stop not in self._stops:
            texts = self._tokenizer.batch_decode([[token] for token in range(len(self._eos))])
            # a character of several bytes may be split between tokens, and a lone token may lose its white space
            plain = all(string[-1].isascii() and not string[-1].isspace() for string in stop)
            suspects = [not plain or any(string[-1] in text for string in stop) for text in texts]
            self._suspects = np.vstack([self._suspects, suspects])
            self._stops.append(stop)
        return self._stops.index(stop)

    def reached(self, rows: Array) -> Array:
        """[n] Whether the newest token is an end-of-turn token or completes a stop string."""
        newest = rows["tokens"][np.arange(len(rows)), rows["length"] - 1]
        ended: Array = self._eos[newest]
        for row in np.flatnonzero(self._suspects[rows["stop"], newest] & ~ended):
            response = rows["tokens"][row, rows["prompt"][row] : rows["length"][row]]
            text = self._tokenizer.decode(response.tolist())
            ended[row] = any(string in text for string in self._stops[rows["stop"][row]])
        return ended
