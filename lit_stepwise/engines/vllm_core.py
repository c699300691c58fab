"""The calls to vLLM, between which the process is the trainer's again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lit_stepwise.engines.vllm_adapters import adapter_request, written
from lit_stepwise.engines.vllm_process import (
    current_gpu,
    finish_gpu_work,
    generators,
    seed_generators,
    set_generators,
)
from lit_stepwise.engines.vllm_ranks import Orders
from lit_stepwise.engines.vllm_settings import sampling_params
from lit_stepwise.engines.vllm_weights import checked, expected_weights, repack
from lit_stepwise.errors import EngineError, StepwiseError
from lit_stepwise.types import Adapter


class VLLMCore:
    """A ``vllm.LLMEngine`` in this process: its weights, its cache, its random numbers and its steps."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.adapter: Any = None
        self._asleep = False
        self._shapes, self._names = expected_weights(engine.model_config.hf_text_config)
        self._generators = generators()
        self._gpu = current_gpu()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Stream them in, waking up for it. Raises ``EngineError`` naming a weight that does not fit."""
        with self._loading(policy_version):
            if self._asleep:
                self.engine.wake_up(["weights"])
            stream = checked(weights, self._shapes, self._names)
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
            self.engine.apply_model(repack)
            if self._asleep:  # the cache comes last: while weights stream in, there is room for them
                self.engine.wake_up(["kv_cache"])
        self._asleep = False
        self.adapter = None  # vLLM drops it when the weights change on which it stands

    def load_adapter(self, adapter: Adapter, policy_version: int) -> None:
        """Put it in the place of the one before."""
        with self._loading(policy_version), written(adapter) as folder:
            self.engine.add_lora(adapter_request(folder, replace=True))
        self.adapter = adapter_request(folder)

    def begin_phase(self, seed: int) -> None:
        """Forget what is cached, and seed the engine's own generators."""
        with self._calling():
            self._reset_cache()
            seed_generators(seed)

    def carry_out(self, orders: Orders) -> list[Any]:
        """A step after them, unless they are the last: the ``vllm.RequestOutput`` of those that finished in it."""
        with self._calling():
            self.engine.abort_request(orders.aborted)
            for request in orders.submitted:
                settings = sampling_params(request, self.engine.model_config.max_model_len)
                prompt = {"prompt_token_ids": list(request.prompt_ids)}
                self.engine.add_request(request.request_id, prompt, settings, lora_request=self.adapter)
            outputs = [] if orders.last else self.engine.step()
        return [output for output in outputs if output.finished]

    def sleep(self) -> bool:
        """Give the memory of weights and cache back; False where vLLM cannot, as on a CPU, and nothing was done."""
        if not self.engine.model_config.enable_sleep_mode:
            return False
        with self._calling():
            self.engine.sleep(level=2)
        self._asleep = True
        return True

    def shut_down(self) -> None:
        """Give everything back, the default process group too."""
        self.engine.engine_core.shutdown()

    @contextmanager
    def _loading(self, policy_version: int) -> Iterator[None]:
        """The trainer may have computed what is loaded, and the engine may use it, in another thread and stream."""
        with self._calling(), torch.no_grad():
            finish_gpu_work()
            yield
            finish_gpu_work()
            self._reset_cache()
            self.engine.set_weight_version(str(policy_version))

    def _reset_cache(self) -> None:
        if not self.engine.reset_prefix_cache(reset_running_requests=True):
            raise EngineError("vLLM did not reset its prefix cache, which holds what older weights computed")

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """In process vLLM samples with torch's global generator: lend it ours, and give the trainer back its own."""
        # one helper of vLLM is compiled even where the model is not, which takes 20 seconds the first time
        stance = "force_eager" if self.engine.model_config.enforce_eager else "default"
        with torch.cuda.device(self._gpu), torch.compiler.set_stance(stance):
            trainer = generators()
            set_generators(self._generators)
            try:
                yield
            except StepwiseError:
                raise
            except Exception as error:  # whatever vLLM raises, it means that it cannot go on
                raise EngineError(f"vLLM failed: {type(error).__name__}: {error}") from error
            finally:
                self._generators = generators()
                set_generators(trainer)
