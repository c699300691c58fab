"""What runs inside the workers of a vLLM server: it says what is served, and takes weights out of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from lit_stepwise.engines.server.protocol import plain_config
from lit_stepwise.engines.vllm_weights import repack


class WorkerExtension:
    """Mixed into vLLM's worker. Where it is imported, the backend ``file`` is known."""

    vllm_config: Any

    def lit_stepwise_description(self) -> dict[str, Any]:
        """What a trainer checks before it plays."""
        from transformers import AutoConfig

        model = self.vllm_config.model_config
        device = self.vllm_config.device_config.device_type
        chunked = self.vllm_config.scheduler_config.enable_chunked_prefill
        return {
            "config": plain_config(AutoConfig.from_pretrained(model.model)),
            "max_context_tokens": model.max_model_len,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device,
            "logprobs_mode": str(model.logprobs_mode),
            "weights_backend": self.vllm_config.weight_transfer_config.backend,
            # on a CPU vLLM dies of a request with a seed whose prompt it reads in chunks
            "takes_seeds": not (device == "cpu" and chunked),
        }


@dataclass
class FileInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to agree on."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One piece of the weights."""

    path: str
    """A safetensors file that every worker can read."""


class FileWeights(WeightTransferEngine):  # type: ignore[misc]
    """Weights by Hugging Face name, in pieces, out of safetensors files that the trainer writes and removes."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Make room, as for any checkpoint that is loaded layer by layer."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdate) -> None:
        """Load one piece; each worker takes its share."""
        self.model.load_weights(load_file(update_info.path).items())

    def finish_weight_update(self) -> None:
        """Finish the layers, and on a CPU renew the packed copies."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack(self.model)

    def shutdown(self) -> None:
        """Nothing to release."""


WeightTransferEngineFactory.register_engine("file", FileWeights)
