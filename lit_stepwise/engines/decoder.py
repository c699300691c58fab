"""Brings up a Hugging Face decoder as the transformers engine can play it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lit_stepwise.errors import EngineError


def load_decoder(model_path: str, dtype: torch.dtype, max_context_tokens: int, device: str) -> tuple[Any, Any]:
    """Model and tokenizer. Raises ``EngineError`` for a model that cannot be loaded or does more than full attention.

    The device may be ``auto``, which takes CUDA where there is one.
    """
    from transformers import AttentionInterface

    model, tokenizer = _load(model_path, dtype, max_context_tokens)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model = model.to(device)
    if device == "cpu" and model.config._attn_implementation == "sdpa":
        AttentionInterface.register("lit_stepwise_grouped", _grouped_attention)
        model.set_attn_implementation("lit_stepwise_grouped")
    return model, tokenizer


def _load(model_path: str, dtype: torch.dtype, max_context_tokens: int) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    local = Path(model_path).is_dir()  # then nothing may ask the hub, which a machine without a network waits for
    try:
        config = AutoConfig.from_pretrained(model_path, local_files_only=local)
        _check(config.get_text_config(), model_path, max_context_tokens)  # before time is spent on weights
        with torch.random.fork_rng(devices=[]):  # loading may draw numbers
            model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=local)
    except (OSError, ValueError) as error:
        raise EngineError(f"model.model_path={model_path} cannot be loaded: {error}") from error
    return model.eval().requires_grad_(False), tokenizer


def _check(config: Any, model_path: str, max_context_tokens: int) -> None:
    limit = getattr(config, "max_position_embeddings", None)  # some models have none
    if limit is not None and max_context_tokens > limit:
        raise EngineError(
            f"rollout.limits.max_context_tokens={max_context_tokens} is more than the {limit} that {model_path} was "
            f"built for; use {limit} or less"
        )
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or (["sliding_attention"] if window else []))
    if window and window >= max_context_tokens:
        kinds.discard("sliding_attention")
    if kinds - {"full_attention"}:
        raise EngineError(
            f"{model_path} has layers of {', '.join(sorted(kinds))}, and the transformers engine can only do full "
            "attention; use the vLLM engine"
        )


def _grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """As transformers' own ``sdpa``, which with a mask first copies all keys and values for each query of a group."""
    output = scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None
