"""A low-rank adapter on its way into vLLM, which reads them from folders alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from lit_stepwise.errors import ConfigError
from lit_stepwise.types import Adapter

_SHARED_MEMORY = Path("/dev/shm")
_NAME = "policy"


def adapter_settings(rank: int) -> dict[str, Any]:
    """``vllm.EngineArgs`` for one adapter of ``rank``, for which vLLM sets aside the next size it knows."""
    from vllm.config.lora import MaxLoRARanks

    sizes = get_args(MaxLoRARanks)
    if rank > max(sizes):
        raise ConfigError(f"an adapter of rank {rank} is too large for vLLM, which takes up to {max(sizes)}")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(size for size in sizes if size >= rank)}


@contextmanager
def written(adapter: Adapter) -> Iterator[str]:
    """A folder of memory that holds it as PEFT would save it, until the end of the block."""
    from safetensors.torch import save_file

    where = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    with TemporaryDirectory(prefix="lit-stepwise-adapter-", dir=where) as folder:
        weights = {name: weight.detach().cpu().contiguous() for name, weight in adapter.weights}
        save_file(weights, Path(folder, "adapter_model.safetensors"))
        config = json.dumps(dict(adapter.config), default=list)  # the names of modules are a set
        Path(folder, "adapter_config.json").write_text(config)
        yield folder


def adapter_request(folder: str, replace: bool = False) -> Any:
    """What a request carries to be answered with the adapter; with ``replace`` it is read from ``folder`` again."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(_NAME, 1, folder, load_inplace=replace)
