"""Sleep needs a GPU. Here a recorder stands for vLLM: it is the order of the calls that is tested, not their effect."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from lit_stepwise.engines.vllm import VLLMEngine
from lit_stepwise.engines.vllm_core import VLLMCore
from lit_stepwise.errors import EngineError
from lit_stepwise.types import Request, Sampling

CONFIG = Qwen3Config(
    hidden_size=8, intermediate_size=8, num_hidden_layers=0, vocab_size=3, layer_types=[], tie_word_embeddings=True
)
WEIGHTS = {"model.embed_tokens.weight": torch.ones(3, 8), "model.norm.weight": torch.ones(8)}


class RecordedVLLM:
    def __init__(self, enable_sleep_mode: bool) -> None:
        self.model_config = SimpleNamespace(
            hf_text_config=CONFIG, enforce_eager=True, enable_sleep_mode=enable_sleep_mode
        )
        self.calls: list[str] = []

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep at level {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        self.calls.append(f"{method} of {len(list(kwargs['weights_iterator']))}")

    def apply_model(self, function: Any) -> None:
        self.calls.append(function.__name__)

    def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        self.calls.append(f"reset cache, running too: {reset_running_requests}")
        return True

    def set_weight_version(self, version: str) -> None:
        self.calls.append(f"version {version}")


def engine_on(vllm: RecordedVLLM) -> VLLMEngine:
    engine = VLLMEngine()
    engine._core = VLLMCore(vllm)
    engine.load_weights(WEIGHTS.items(), 6)
    vllm.calls.clear()
    return engine


def test_an_engine_that_slept_wakes_for_its_weights_and_then_for_its_cache() -> None:
    vllm = RecordedVLLM(enable_sleep_mode=True)
    engine = engine_on(vllm)
    engine.sleep()
    assert vllm.calls == ["sleep at level 2"]
    assert engine.policy_version == -1
    with pytest.raises(EngineError, match="submit was called on an engine that has no weights"):
        engine.submit(Request("a", [1], 1, Sampling(), 0))
    loading = ["reload_weights of 2", "repack"]
    renewing = ["reset cache, running too: True", "version 7"]
    engine.load_weights(WEIGHTS.items(), 7)
    assert vllm.calls[1:] == ["wake weights", *loading, "wake kv_cache", *renewing]
    assert engine.policy_version == 7
    vllm.calls.clear()
    engine.load_weights(WEIGHTS.items(), 7)
    assert vllm.calls == loading + renewing


def test_where_vllm_cannot_sleep_the_weights_stay() -> None:
    vllm = RecordedVLLM(enable_sleep_mode=False)
    engine = engine_on(vllm)
    engine.sleep()
    assert vllm.calls == []
    assert engine.policy_version == 6


def test_a_cache_that_is_not_reset_is_an_error() -> None:
    vllm = RecordedVLLM(enable_sleep_mode=False)
    engine = engine_on(vllm)
    vllm.reset_prefix_cache = lambda reset_running_requests: False  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="vLLM did not reset its prefix cache"):
        engine.load_weights(WEIGHTS.items(), 7)
    assert engine.policy_version == -1
