"""What the engine takes of a device, awake and asleep, and how much it can hold in its cache."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from lit_stepwise.engines import AutoEngine, TransformersEngine, VLLMEngine
from lit_stepwise.interfaces import Engine
from lit_stepwise.planning.assumptions import Assumptions
from lit_stepwise.planning.machine import GIB, Machine

_CPU_CACHE = 256 << 20
"""Of vLLM on a CPU, unless ``kv_cache_memory_mb`` says otherwise."""


@dataclass(frozen=True, slots=True)
class EngineRoom:
    """Bytes on each of the devices that one engine spans."""

    name: str
    num_devices: int
    """That one engine spans."""
    weights: float
    overhead: float
    """While it plays: activations, graphs."""
    cache: float
    """For keys and values; below zero where not even the rest fits."""
    awake: float
    asleep: float
    bytes_per_token: float
    """Of keys and values, on each device."""
    setting: str = ""
    """Of the engine, what its share is set by."""
    is_known: bool = True
    """False: an engine elsewhere, or of a class that plan does not know; nothing of it is counted."""

    @property
    def tokens(self) -> int:
        """That the cache of one engine has room for."""
        return int(max(self.cache, 0.0) / self.bytes_per_token) if self.is_known else 0

    def sequences(self, max_context_tokens: int) -> float:
        """Of full length that it can hold at a time."""
        return self.tokens / max_context_tokens


def engine_room(engine: Engine, config: Any, num_parameters: int, machine: Machine, assume: Assumptions) -> EngineRoom:
    """Of the engine of a configuration, for a model of that configuration."""
    engine = _chosen(engine)
    text = config.get_text_config(decoder=True)
    span = engine.tensor_parallel_size
    if isinstance(engine, VLLMEngine):
        dtype = _dtype(engine.dtype, text, machine.kind)
        weights = num_parameters * dtype.itemsize / span
        per_token = _bytes_per_token(text, dtype, span)
        if machine.kind == "cpu":
            cache = float((engine.kv_cache_memory_mb or 0) << 20 or _CPU_CACHE)
            taken = weights + cache
            return EngineRoom("VLLMEngine", span, weights, 0.0, cache, taken, taken, per_token)
        overhead = assume.engine_overhead_gib * GIB
        given = engine.kv_cache_memory_mb
        awake = engine.gpu_memory_utilization * machine.memory if given is None else weights + overhead + (given << 20)
        sleeps = (engine.engine_kwargs or {}).get("enable_sleep_mode", True)
        asleep = assume.engine_asleep_gib * GIB if sleeps else awake
        cache = awake - weights - overhead
        setting = "gpu_memory_utilization" if given is None else "kv_cache_memory_mb"
        return EngineRoom("VLLMEngine", span, weights, overhead, cache, awake, asleep, per_token, setting)
    if isinstance(engine, TransformersEngine):
        dtype = getattr(torch, engine.dtype)
        weights = float(num_parameters * dtype.itemsize)
        # its cache grows with what is played; what it may take is all that the trainer leaves
        return EngineRoom(
            "TransformersEngine", 1, weights, 0.0, 0.0, weights, weights, _bytes_per_token(text, dtype, 1)
        )
    return EngineRoom(type(engine).__name__, 1, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, is_known=False)


def _chosen(engine: Engine) -> Engine:
    """Of an ``AutoEngine`` the one that it would take, if that starts."""
    if not isinstance(engine, AutoEngine):
        return engine
    return engine.first if not isinstance(engine.first, VLLMEngine) or find_spec("vllm") else engine.second


def _dtype(name: str, text: Any, kind: str) -> torch.dtype:
    """As ``VLLMEngine`` says of ``auto``."""
    stored = getattr(text, "dtype", None)
    if name == "auto":
        return torch.float32 if kind == "cpu" or stored is None else stored
    found: torch.dtype = {"half": torch.float16, "float": torch.float32}.get(name) or getattr(torch, name)
    return found


def _bytes_per_token(text: Any, dtype: torch.dtype, span: int) -> float:
    """Keys and values of all layers; heads are dealt out to devices, and repeated where there are more devices."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return float(2 * text.num_hidden_layers * max(heads / span, 1) * size * dtype.itemsize)
