"""Engines that sample responses. None imports vLLM or transformers before it is started."""

from lit_stepwise.engines.auto import AutoEngine
from lit_stepwise.engines.server.engine import VLLMServerEngine
from lit_stepwise.engines.transformers import TransformersEngine
from lit_stepwise.engines.vllm import VLLMEngine

__all__ = ["AutoEngine", "TransformersEngine", "VLLMEngine", "VLLMServerEngine"]
