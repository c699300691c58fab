"""What a forward pass costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations of one forward pass of a decoder; one multiplication and one addition are two.

    Training costs three times as much, since a backward pass is two forward ones; what gradient checkpointing computes
    again is not counted. Norms, activations, rotations and the softmax are left out.
    """

    per_token: float
    """Matrix products of the layers: 2 x weights that a token passes."""
    per_pair: float
    """Attention, for each query and each key that it sees: 4 x layers x heads x head dimension."""
    per_target: float
    """The output head: 2 x hidden size x vocabulary."""

    def __call__(self, tokens: float, pairs: float, targets: float) -> float:
        """Of so many tokens computed, pairs of query and key, and positions whose distribution is asked for."""
        return self.per_token * tokens + self.per_pair * pairs + self.per_target * targets

    @classmethod
    def of(cls, model: Any) -> Flops:
        """Counted from the weights and the configuration of a Hugging Face causal language model.

        Where a token passes through some experts of a layer only, so many count.
        """
        config = model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            per_token=2.0 * sum(_weights_passed(model, _share_of_experts(config))),
            per_pair=4.0 * config.num_hidden_layers * config.num_attention_heads * head_dim,
            per_target=2.0 * model.get_output_embeddings().weight.numel(),
        )


def pairs_of(length: int) -> int:
    """Pairs of query and key in one causal sequence: each token sees itself and all before it."""
    return length * (length + 1) // 2


def _weights_passed(model: Any, share_of_experts: float) -> Iterator[float]:
    """Weights of each matrix of the layers, adapters included, that one token is multiplied by."""
    apart = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    apart.add(id(model.get_output_embeddings().weight))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in apart:
            yield parameter.numel() * (share_of_experts if "experts" in name.split(".") else 1.0)


def _share_of_experts(config: Any) -> float:
    """Of the experts of a layer, those that a token goes to."""
    names = ("num_experts", "num_local_experts")
    num_experts = next((getattr(config, name) for name in names if getattr(config, name, None)), 1)
    return float(getattr(config, "num_experts_per_tok", None) or num_experts) / num_experts
