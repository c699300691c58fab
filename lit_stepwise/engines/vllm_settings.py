"""What we ask of vLLM, in its own words."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lit_stepwise.engines.vllm_adapters import adapter_settings
from lit_stepwise.errors import ConfigError, EngineError
from lit_stepwise.types import Completion, Request, VersionSpan

_CPU_KV_CACHE_MB = 256  # is filled with zeros at start, which takes seconds for a gigabyte


def on_cpu() -> bool:
    """Whether this build of vLLM runs on CPUs. Imports vLLM."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def resolve_dtype(dtype: str, model_path: str) -> str:
    """``dtype``, where it is not ``auto``; else what ``VLLMEngine`` says of ``auto``."""
    from transformers import AutoConfig

    if dtype != "auto":
        return dtype
    stored = AutoConfig.from_pretrained(model_path).get_text_config().dtype
    return "float32" if on_cpu() or stored in (None, torch.float32) else "auto"


def engine_settings(
    model_path: str,
    max_context_tokens: int,
    adapter_rank: int,
    dtype: str,
    kv_cache_memory_mb: int | None,
    enforce_eager: bool | None,
) -> dict[str, Any]:
    """``vllm.EngineArgs`` for this machine. Arguments that have the name of a setting are what it says."""
    settings: dict[str, Any] = {
        "model": model_path,
        "load_format": "dummy",
        "dtype": resolve_dtype(dtype, model_path),
        "max_model_len": max_context_tokens,
        "enforce_eager": on_cpu() if enforce_eager is None else enforce_eager,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
    }
    if on_cpu():
        settings["block_size"] = 32  # the smallest there is: a prefix is cached in whole blocks
    else:
        settings["enable_sleep_mode"] = True
    if kv_cache_memory_mb or on_cpu():
        settings["kv_cache_memory_bytes"] = (kv_cache_memory_mb or _CPU_KV_CACHE_MB) << 20
    if adapter_rank:
        settings.update(adapter_settings(adapter_rank))
    if dist.is_initialized() and dist.get_world_size() > 1:
        settings["distributed_executor_backend"] = "external_launcher"  # this process is one rank of many
    return settings


def build(settings: dict[str, Any]) -> Any:
    """A ``vllm.LLMEngine``. Raises ``ConfigError`` when the model cannot read as many tokens as it is to."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    limit = EngineArgs(**{**settings, "max_model_len": None}).create_model_config().max_model_len
    if settings["max_model_len"] > limit:
        raise ConfigError(
            f"rollout.limits.max_context_tokens={settings['max_model_len']} is more than the {limit} tokens that "
            f"{settings['model']} can read; use {limit} or fewer"
        )
    return LLMEngine.from_engine_args(EngineArgs(**settings))


def sampling_params(request: Request, max_context_tokens: int) -> Any:
    """For the response to ``request``, which has to fit into the context with its prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=request.sampling.temperature,
        top_p=request.sampling.top_p,
        stop=list(request.sampling.stop) or None,
        include_stop_str_in_output=True,
        detokenize=bool(request.sampling.stop),  # costs a fifth of a small model's time
        skip_special_tokens=False,  # a stop string is looked for in the text that the environment reads
        max_tokens=min(request.max_new_tokens, max_context_tokens - len(request.prompt_ids)),
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def completion(output: Any, policy_version: int) -> Completion:
    """What a finished ``vllm.RequestOutput`` says; ``policy_version`` where it does not say which weights sampled."""
    sampled = output.outputs[0]
    if list(sampled.logprobs.token_ids) != list(sampled.token_ids):
        raise EngineError(f"vLLM returned logprobs of other tokens than it sampled for {output.request_id}")
    if sampled.finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended request {output.request_id} with {sampled.finish_reason}")
    return Completion(
        request_id=output.request_id,
        response_ids=list(sampled.token_ids),  # the text is not used: vLLM may cut it inside of a token
        logprobs=list(sampled.logprobs.logprobs),
        finish_reason=sampled.finish_reason,
        versions=[VersionSpan(int(span.version), span.end - span.start) for span in sampled.weight_versions or ()]
        or [VersionSpan(policy_version, len(sampled.token_ids))],
        num_cached_tokens=output.num_cached_tokens or 0,
    )
