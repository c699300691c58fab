"""What vLLM leaves to its caller when new weights stream in: to see that all come, and to renew its packed copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lit_stepwise.engines.vllm_settings import on_cpu
from lit_stepwise.errors import EngineError


def expected_weights(config: Any) -> tuple[dict[str, torch.Size], set[str]]:
    """Shapes by every name a weight may come under, and the names that must come."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: weight.shape for name, weight in model.named_parameters(remove_duplicate=False)}
    return shapes, {name for name, _ in model.named_parameters()}


def checked(
    weights: Iterable[tuple[str, Tensor]], shapes: dict[str, torch.Size], names: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Pass them on, and raise ``EngineError`` for one that is unknown, misshapen or, at the end, missing.

    ``shapes`` and ``names`` are those of ``expected_weights``. vLLM itself would only warn of what is missing.
    """
    missing = set(names)
    for name, weight in weights:
        if name not in shapes:
            raise EngineError(f"load_weights got {name}, which the engine's model does not have")
        if shapes[name] != weight.shape:
            raise EngineError(f"load_weights got {name} of {tuple(weight.shape)}, not {tuple(shapes[name])}")
        missing.discard(name)
        yield name, weight.detach()
    if missing:
        raise EngineError(f"load_weights got no {', '.join(sorted(missing))}; send every weight")


def repack(model: torch.nn.Module) -> None:
    """On a CPU linear layers multiply with a packed copy, which a reload leaves old in a head tied to the embedding."""
    if not on_cpu():
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.ndim == 2 and weight.numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
