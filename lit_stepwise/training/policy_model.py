"""A causal language model that answers with log-probabilities instead of logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_stepwise.algo.logprobs import entropy, token_logprobs
from lit_stepwise.errors import ConfigError
from lit_stepwise.types import MicroBatch


class PolicyModel(nn.Module):
    """Wraps a Hugging Face model. The head runs inside ``forward``, which is where sharded weights are whole."""

    def __init__(self, language_model: Any, chunk_tokens: int = 2048) -> None:
        super().__init__()
        self.language_model = language_model
        self.chunk_tokens = chunk_tokens

    @classmethod
    def load(cls, path: str, chunk_tokens: int, setting: str = "model.model_path") -> PolicyModel:
        """Read the weights as float32, in training mode. Raises ``ConfigError``, naming ``setting``, if that fails."""
        from transformers import AutoModelForCausalLM  # seconds of import that other commands need not pay

        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            hint = "" if Path(path).exists() else "; the folder does not exist"
            raise ConfigError(f"{setting}={path!r} cannot be loaded{hint}: {reason}") from error
        return cls(model.train(), chunk_tokens)

    @property
    def num_tokens(self) -> int:
        """Rows of the output embedding."""
        return len(self.language_model.get_output_embeddings().weight)

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """As engines compute, and whoever recomputes what they did."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def logprobs(self, batch: MicroBatch) -> Tensor:
        """[N] Those of ``forward``, alone."""
        logprobs: Tensor = self(batch.token_ids, batch.response_mask, batch.temperatures)[0]
        return logprobs

    def forward(
        self,
        token_ids: Tensor,
        response_mask: Tensor,
        temperatures: Tensor,
        entropy_gradient: bool = False,
        summary: Callable[[Tensor], Tensor] = entropy,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every response token.

        Args:
            token_ids: [B, S] padded on the right; causality keeps the padding out of what counts.
            response_mask: [B, S] True on the N tokens asked for, never on the first of a row.
            temperatures: [N]
            entropy_gradient: the entropies carry a gradient, too.
            summary: what to say of the distribution of each token in place of its entropy, as in ``token_logprobs``.

        Returns:
            logprobs [N] with gradient, entropies [N] without unless asked for; in row-major order of the mask.
        """
        hidden = self.language_model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
        asked = response_mask[:, 1:]
        head = self.language_model.get_output_embeddings().weight
        targets = token_ids[:, 1:][asked]
        return token_logprobs(
            hidden[:, :-1][asked], head, targets, temperatures, self.chunk_tokens, entropy_gradient, summary
        )
