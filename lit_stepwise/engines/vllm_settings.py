"""What we ask of vLLM, in its own words."""

from __future__ import annotations

from typing import Any

import torch

from lit_stepwise.types import Sampling


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


def sampling_params(sampling: Sampling, max_tokens: int) -> Any:
    """For a response of at most ``max_tokens`` tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop=list(sampling.stop) or None,
        include_stop_str_in_output=True,
        skip_special_tokens=False,  # a stop string is looked for in the text that the environment reads
        max_tokens=max_tokens,
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
