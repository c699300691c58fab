"""The process of a vLLM server: turns our settings into vLLM's own, and serves.

python -m lit_stepwise.engines.server.main SETTINGS_AS_JSON
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

_CPU_KV_CACHE_MB = 256  # is filled with zeros at start, which takes seconds for a gigabyte
_CPU_BATCHED_TOKENS = 2048  # vLLM's own default


def flags(settings: Mapping[str, Any]) -> list[str]:
    """As words of a command line: ``True`` is ``--name``, ``False`` ``--no-name``; lists and mappings are JSON."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, Mapping | list) else str(value)]
    return words


def server_settings(settings: Mapping[str, Any], cpu: bool, dtype: str) -> dict[str, Any]:
    """What ``VLLMServerEngine`` needs of a server, in vLLM's words. ``settings["server_kwargs"]`` win."""
    max_context_tokens: int = settings["max_context_tokens"]
    chosen: dict[str, Any] = {
        "model": settings["model_path"],
        **settings["address"],
        "max_model_len": max_context_tokens,
        "dtype": dtype,
        "logprobs_mode": "processed_logprobs",
        "enable_scale_out": True,  # the endpoint that takes and gives token ids
        "enable_prompt_tokens_details": True,  # or it does not say what came out of the prefix cache
        "weight_transfer_config": {"backend": settings["weights_backend"]},
        "worker_extension_cls": "lit_stepwise.engines.server.worker.WorkerExtension",
        "disable_uvicorn_access_log": True,
    }
    if cpu:
        chosen |= {
            "enforce_eager": True,  # compiling takes longer than it saves
            "block_size": 32,  # the smallest there is: a prefix is cached in whole blocks
            "kv_cache_memory_bytes": _CPU_KV_CACHE_MB << 20,
            "enable_chunked_prefill": False,  # fails for requests with a seed
            "max_num_batched_tokens": max(max_context_tokens, _CPU_BATCHED_TOKENS),
        }
    return {**chosen, **settings["server_kwargs"]}


def main() -> None:
    """Serve until SIGTERM."""
    from lit_stepwise.engines.vllm_settings import on_cpu, resolve_dtype

    settings = json.loads(sys.argv[1])
    dtype = resolve_dtype(settings["dtype"], settings["model_path"])
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # opens the endpoints for new weights
    cpu = on_cpu()
    if cpu:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # or one helper is compiled all the same, which takes 20 seconds
    sys.argv[1:] = flags(server_settings(settings, cpu, dtype))
    from vllm.entrypoints.launchers.api_server.entry import main as serve  # `vllm serve` fails in the CPU build

    serve()


if __name__ == "__main__":
    main()
