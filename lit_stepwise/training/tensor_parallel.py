"""Ranks that compute each layer together: every one has some of the heads, and some of the columns of the MLP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from math import gcd
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lit_stepwise.errors import ConfigError
from lit_stepwise.training.sharding import local

_IN_PARTS = "replicated_with_grad_allreduce"
"""What transformers calls a weight that is whole on every rank, where each uses it for its own heads alone."""


class TensorParallel:
    """Splits the layers of a Hugging Face model over the ranks of ``mesh``, by the plan that transformers has for it.

    Embedding, head and norms of the hidden state are whole on every rank, which computes the same with them. As in
    Megatron-LM (arXiv:1909.08053, section 3).

    Args:
        language_model: not sharded yet. It may be on the meta device.
        mesh: of one dimension.
    """

    def __init__(self, language_model: Any, mesh: DeviceMesh) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        plan = _plan_of(language_model, mesh.size())
        styles: dict[str, Any] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
        base = language_model.base_model
        split: dict[str, Any] = {name: styles[style]() for name, style in plan.items() if style in styles}
        parallelize_module(base, mesh, split)
        self._group = mesh.get_group()
        self._in_parts = [
            module
            for name, module in base.named_modules()
            if any(fnmatchcase(name, pattern) for pattern, style in plan.items() if style == _IN_PARTS)
        ]

    def finish_gradients(self) -> None:
        """Sum those of which each rank has the part of its own heads. Once, between backward passes and the step."""
        for gradient in self._gradients_in_parts():
            dist.all_reduce(gradient, group=self._group)

    def _gradients_in_parts(self) -> Iterator[Any]:
        for module in self._in_parts:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    yield local(parameter.grad)


def check_size(size: int, num_devices: int) -> None:
    """Raises ``ConfigError`` where so many of the ranks of a node cannot compute layers together."""
    setting = f"trainer.strategy.init_args.tensor_parallel_size={size}"
    if size < 1 or num_devices % size:
        raise ConfigError(f"{setting} does not divide trainer.devices={num_devices}; use {_or(_divisors(num_devices))}")


def _plan_of(language_model: Any, size: int) -> dict[str, str]:
    """Style of each module of the base model, by the pattern of its name. Raises ``ConfigError`` for what has none."""
    config = language_model.config.get_text_config(decoder=True)
    plan = {
        name: style
        for name, style in (getattr(config, "base_model_tp_plan", None) or {}).items()
        if name.startswith("layers.")
    }
    setting = f"trainer.strategy.init_args.tensor_parallel_size={size}"
    unknown = sorted({*plan.values()} - {"colwise", "rowwise", _IN_PARTS})
    if not plan or unknown:
        what = (
            f"split in ways that are not known here ({', '.join(unknown)})" if unknown else "not split by transformers"
        )
        raise ConfigError(f"{setting}: models of type {config.model_type} are {what}; use 1")
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    for what, number in {
        "heads": heads,
        "key heads": key_heads,
        "columns of the MLP": config.intermediate_size,
    }.items():
        if number % size:
            fitting = _divisors(gcd(heads, key_heads, config.intermediate_size))
            raise ConfigError(f"{setting} does not divide the model's {number} {what}; use {_or(fitting)}")
    return plan


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))
