"""The fastest engine that runs here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lit_stepwise.engines.transformers import TransformersEngine
from lit_stepwise.engines.vllm import VLLMEngine
from lit_stepwise.errors import EngineError
from lit_stepwise.interfaces import Engine
from lit_stepwise.types import Adapter, Completion, Request

if TYPE_CHECKING:
    from torch import Tensor


class AutoEngine(Engine):
    """vLLM where it is installed and starts, else transformers. Its description says which, and why."""

    def __init__(self, first: Engine | None = None, second: Engine | None = None) -> None:
        """Settings only.

        Args:
            first: The engine to try; by default vLLM.
            second: The engine to take when the first raises ``EngineError`` at start; by default transformers.
        """
        self.first = first or VLLMEngine()
        self.second = second or TransformersEngine()
        self._chosen: Engine | None = None
        self._reason = ""

    @property
    def tensor_parallel_size(self) -> int:  # type: ignore[override]
        """Of the engine that was chosen; before ``start`` of the one to try."""
        return (self._chosen or self.first).tensor_parallel_size

    @property
    def takes_adapters(self) -> bool:  # type: ignore[override]
        """Of the engine that was chosen; before ``start`` of the one to try."""
        return (self._chosen or self.first).takes_adapters

    @property
    def on_one_machine(self) -> bool:  # type: ignore[override]
        """Of the engine that was chosen; before ``start`` of the one to try."""
        return (self._chosen or self.first).on_one_machine

    def start(self, model_path: str, max_context_tokens: int, adapter_rank: int = 0) -> None:
        """Start the first that can. Raises ``EngineError`` when neither can."""
        self._chosen = None
        try:
            self.first.start(model_path, max_context_tokens, adapter_rank)
        except EngineError as error:
            self.first.close()
            self.second.start(model_path, max_context_tokens, adapter_rank)
            self._chosen, self._reason = self.second, f" (because {' '.join(str(error).split())})"
        else:
            self._chosen, self._reason = self.first, ""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Take new weights."""
        self._started.load_weights(weights, policy_version)

    def load_adapter(self, adapter: Adapter, policy_version: int) -> None:
        """Take a new adapter."""
        self._started.load_adapter(adapter, policy_version)

    def begin_phase(self, seed: int) -> None:
        """Start a phase of play."""
        self._started.begin_phase(seed)

    def end_phase(self) -> None:
        """Give up what is pending."""
        if self._chosen:
            self._chosen.end_phase()

    def follow(self) -> None:
        """Do as the leader does."""
        self._started.follow()

    def submit(self, request: Request) -> None:
        """Queue one request."""
        self._started.submit(request)

    def step(self) -> list[Completion]:
        """Advance all requests."""
        return self._started.step()

    def abort(self, request_ids: Sequence[str]) -> None:
        """Give these requests up."""
        self._started.abort(request_ids)

    def sleep(self) -> None:
        """Lend memory to the trainer."""
        self._started.sleep()

    @property
    def num_pending(self) -> int:
        """Requests submitted and not finished."""
        return self._chosen.num_pending if self._chosen else 0

    @property
    def policy_version(self) -> int:
        """``global_step`` of the weights it samples from."""
        return self._chosen.policy_version if self._chosen else -1

    @property
    def description(self) -> str:
        """One line for people."""
        return self._chosen.description + self._reason if self._chosen else "vLLM or transformers, not started"

    def close(self) -> None:
        """Give memory and processes back."""
        self._chosen = None
        for engine in (self.first, self.second):
            engine.close()

    @property
    def _started(self) -> Engine:
        if self._chosen is None:
            raise EngineError("the engine was used before start")
        return self._chosen
