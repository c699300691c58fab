"""Training a low-rank adapter in place of the weights, with PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from lit_stepwise.errors import ConfigError
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.types import Adapter, MicroBatch

_NAME = "default"
"""What PEFT calls an adapter that was given no name."""
_OF_ADAPTER = re.compile(rf"\.lora_[AB]\.{_NAME}\.weight$")


@dataclass(frozen=True)
class Lora:
    """Two thin matrices beside a linear layer, W + alpha / rank x B A, which alone are trained (arXiv:2106.09685)."""

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: int = 32
    """Over ``rank`` it is what B A is multiplied by."""
    dropout: float = 0.0
    """Of what goes into A, in updates alone; above 0 the trainer's logprobs differ from the engine's by it."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Ends of the names of linear layers, e.g. [q_proj, v_proj]; all-linear: all but the output embedding."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"model.lora.rank={self.rank} leaves nothing to train; use 1 or more")
        if self.alpha < 1:
            raise ConfigError(f"model.lora.alpha={self.alpha} silences the adapter; use 1 or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.lora.dropout={self.dropout} is outside [0, 1); 0 drops nothing")
        if not self.target_modules:
            raise ConfigError("model.lora.target_modules is empty; name layers, or use all-linear")

    def check(self) -> None:
        """Raises ``ConfigError`` where PEFT is not installed."""
        if find_spec("peft") is None:
            raise ConfigError("model.lora needs PEFT; install it with: pip install 'lit-stepwise[lora]'")

    def attach(self, policy: PolicyModel) -> None:
        """Put a fresh adapter, which changes nothing yet, into the language model, and freeze the rest."""
        self.inject(policy.language_model)

    def inject(self, model: Any) -> None:
        """The same for a language model alone, which may be on the meta device."""
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=self.target_modules,
            task_type="CAUSAL_LM", base_model_name_or_path=model.name_or_path,
        )  # fmt: skip
        try:
            inject_adapter_in_model(config, model, _NAME)
        except ValueError as error:
            raise ConfigError(
                f"model.lora.target_modules={self.target_modules} does not fit the model: {error}; use all-linear, or "
                "ends of the names of its linear layers"
            ) from error
        self._check_layers(model)

    def _check_layers(self, model: Any) -> None:
        from peft.tuners.lora import Linear

        for name, layer in adapted_layers(model):
            if not isinstance(layer, Linear) or layer is model.get_output_embeddings():
                raise ConfigError(
                    f"model.lora.target_modules={self.target_modules} adapts {name}, which is no linear layer inside "
                    "the model; leave it out, or use all-linear"
                )


class WithoutAdapter:
    """The policy's own model with the adapter switched off: a frozen reference that takes no memory."""

    def __init__(self, model: PolicyModel) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> Tensor:
        """[N] Its log-probabilities, on the device of the batch."""
        with self.model.without_dropout(), _switched_off(self.model.language_model):
            return self.model.logprobs(batch)


def adapted_layers(model: Any) -> list[tuple[str, Any]]:
    """The layers that have an adapter beside them, with their Hugging Face names."""
    from peft.tuners.lora import LoraLayer

    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]


def weights_of(model: Any, merged: bool) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) of every weight, one at a time; ``merged`` adds the adapter, where there is one.

    A merged weight exists only until the next is asked for.
    """
    for name, parameter in model.named_parameters():
        if _OF_ADAPTER.search(name):
            continue
        layer, of_layer, rest = name.partition(".base_layer.")
        value = whole(parameter)
        if merged and of_layer and rest == "weight":
            value = value + _product(model.get_submodule(layer))
        yield f"{layer}.{rest}" if of_layer else name, value


def adapter_of(model: Any) -> Adapter:
    """What PEFT would save. Its weights are views of those in training."""
    return Adapter(_saved_config(model), _adapter_weights(model))


def whole(parameter: Tensor) -> Tensor:
    """Without gradient; where it is sharded, put together, which all ranks do at the same time."""
    value = parameter.detach()
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full


def _product(layer: Any) -> Tensor:
    """[out, in] alpha / rank x B A; transposed where the layer keeps its weight so."""
    product: Tensor = layer.scaling[_NAME] * (whole(layer.lora_B[_NAME].weight) @ whole(layer.lora_A[_NAME].weight))
    return product.T if layer.fan_in_fan_out else product


def _adapter_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if _OF_ADAPTER.search(name):
            # PEFT saves a model that it has wrapped twice
            yield f"base_model.model.{name.replace(f'.{_NAME}.', '.')}", whole(parameter)


def _saved_config(model: Any) -> Mapping[str, Any]:
    config = model.peft_config[_NAME].to_dict() | {"inference_mode": True}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


@contextmanager
def _switched_off(model: Any) -> Iterator[None]:
    layers = [layer for _, layer in adapted_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
