"""Training a low-rank adapter in place of the weights, with PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_stepwise.errors import ConfigError
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.training.sharding import Unit, plain_name, units_of
from lit_stepwise.types import Adapter, MicroBatch

_NAME = "default"
"""What PEFT calls an adapter that was given no name."""
_PREFIX = "language_model."
"""Of the names inside a ``PolicyModel``."""
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

        device = next(model.parameters()).device
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=self.target_modules,
            task_type="CAUSAL_LM", base_model_name_or_path=model.name_or_path,
        )  # fmt: skip
        try:
            with device:
                inject_adapter_in_model(config, model, _NAME)
        except ValueError as error:
            raise ConfigError(
                f"model.lora.target_modules={self.target_modules} does not fit the model: {error}; use all-linear, or "
                "ends of the names of its linear layers"
            ) from error
        self._check_layers(model)
        for name, parameter in model.named_parameters():
            if is_of_adapter(name) and device.type != "meta":
                parameter.data.copy_(fresh(name, parameter.shape))

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
            logprobs: Tensor = self.model(batch)[0]
        return logprobs


def adapted_layers(model: Any) -> list[tuple[str, Any]]:
    """The layers that have an adapter beside them, with the names they have without sharding."""
    from peft.tuners.lora import LoraLayer

    return [(plain_name(name), layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of that name is one of an adapter."""
    return _OF_ADAPTER.search(name) is not None


def fresh(name: str, shape: torch.Size) -> Tensor:
    """What a parameter of an adapter begins as: B is 0, A is drawn as PEFT does it, from the seed and the name alone.

    So it is the same on all ranks, however many there are and whatever else was drawn.
    """
    value = torch.zeros(shape)
    if ".lora_A." in name:
        seed = int.from_bytes(sha256(f"{torch.initial_seed()} {name}".encode()).digest()[:8])
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
    return value


def name_of_base(name: str) -> str:
    """What a parameter was called before there was an adapter beside it."""
    return name.replace(".base_layer.", ".")


def weights_of(model: nn.Module, merged: bool) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) of every weight, one at a time; ``merged`` adds the adapter, where there is one.

    ``model`` is a policy or a language model. A merged weight exists only until the next is asked for.
    """
    modules = {plain_name(name): module for name, module in model.named_modules()}
    for unit in units_of(model):
        for name in unit.parameters:
            if is_of_adapter(name):
                continue
            layer, _, rest = name.partition(".base_layer.")
            value = unit.whole(name)
            if merged and rest == "weight":
                value = value + _product(modules[layer], layer, unit)
            yield name_of_base(name).removeprefix(_PREFIX), value


def adapter_of(model: nn.Module) -> Adapter:
    """What PEFT would save of the adapter in a policy or a language model.

    Its weights are views of those in training, where each rank holds them whole.
    """
    adapted = next(module for module in model.modules() if hasattr(module, "peft_config"))
    return Adapter(_saved_config(adapted), _adapter_weights(model))


def _product(layer: Any, name: str, unit: Unit) -> Tensor:
    """[out, in] alpha / rank x B A; transposed where the layer keeps its weight so."""
    a, b = (unit.whole(f"{name}.lora_{each}.{_NAME}.weight") for each in "AB")
    product: Tensor = layer.scaling[_NAME] * (b @ a)
    return product.T if layer.fan_in_fan_out else product


def _adapter_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for unit in units_of(model):
        for name in filter(is_of_adapter, unit.parameters):
            # PEFT saves a model that it has wrapped twice
            short = name.removeprefix(_PREFIX).replace(f".{_NAME}.", ".")
            yield f"base_model.model.{short}", unit.whole(name)


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
