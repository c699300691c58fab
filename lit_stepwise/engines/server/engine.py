"""vLLM behind HTTP: servers on GPUs of their own, or on other machines, that play while the trainer trains."""

from __future__ import annotations

import queue
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lit_stepwise.engines.server.process import (
    ServerProcess,
    check_installed,
    check_model_path,
    expect_running,
    wait_until_ready,
)
from lit_stepwise.engines.server.protocol import check_facts, check_here, completion, facts_in, request_body
from lit_stepwise.engines.server.ranks import Ranks
from lit_stepwise.engines.server.weights import FileSender, NCCLSender, WeightSender
from lit_stepwise.engines.vllm_weights import checked, expected_weights
from lit_stepwise.errors import ConfigError, EngineError
from lit_stepwise.interfaces import Engine
from lit_stepwise.types import Completion, Request

if TYPE_CHECKING:
    from lit_stepwise.engines.server.client import Servers

_STEP_SECONDS = 0.01
_LOAD_SECONDS = 1800.0  # in which the first rank has to be done with sending weights, or the others give up


class VLLMServerEngine(Engine):
    """Samples with vLLM servers, which all ranks share: those at ``urls``, or child processes of the first rank.

    With ``seed_requests`` a response follows ``Request.seed`` alone as far as their arithmetic does: in float32 on
    a CPU; on a GPU rounding depends on what else is in the batch, unless they run with ``VLLM_BATCH_INVARIANT=1``.
    """

    def __init__(
        self,
        urls: list[str] | None = None,
        num_servers: int = 1,
        devices: list[str] | None = None,
        dtype: str = "auto",
        server_kwargs: dict[str, Any] | None = None,
        weights_backend: Literal["file", "nccl"] = "file",
        weights_folder: str | None = None,
        seed_requests: bool = False,
        reconnect_seconds: float = 5.0,
        health_seconds: float = 120.0,
        start_seconds: float = 600.0,
    ) -> None:
        """Settings only.

        Args:
            urls: Of servers that ``lit-stepwise serve`` started, such as http://node2:8000. They decide on the settings
                below that are said to be for child processes.
            num_servers: Child processes to start where there are no ``urls``.
            devices: ``CUDA_VISIBLE_DEVICES`` of each child process; by default that of the trainer.
            dtype: Of weights and cache of child processes. ``auto`` is float32 on a CPU and for float32 checkpoints;
                else the checkpoint's.
            server_kwargs: More settings of vLLM for child processes, such as tensor_parallel_size; they win.
            weights_backend: How weights come to child processes. ``file``: through files in ``weights_folder``.
                ``nccl``: from GPU to GPU, which has to be another than the trainer's.
            weights_folder: Where pieces of the weights lie while they are loaded; by default /dev/shm. Servers on other
                machines need one that they share with the first rank.
            seed_requests: Whether ``Request.seed`` decides a response. vLLM then draws one request at a time, which
                takes a CPU half as long again or more.
            reconnect_seconds: After which a server that shows no sign of life is lost.
            health_seconds: After which a server that shows some, but computes nothing, is lost.
            start_seconds: In which child processes have to come up.
        """
        if num_servers < 1:
            raise ConfigError(f"rollout.engine num_servers={num_servers} leaves none to play; use 1 or more")
        for url in urls or []:
            if not url.startswith(("http://", "https://", "unix:")):
                raise ConfigError(f"rollout.engine urls has {url}; write it in full, such as http://node2:8000")
        if devices is not None and (urls or len(devices) != num_servers):
            raise ConfigError(
                f"rollout.engine devices={devices} with num_servers={num_servers} and urls={urls}; give one for each "
                "child process, and none for servers that run already"
            )
        self.urls = urls
        self.on_one_machine = not urls
        self.num_servers = num_servers
        self.devices = devices
        self.dtype = dtype
        self.server_kwargs = server_kwargs or {}
        self.weights_backend = weights_backend
        self.weights_folder = weights_folder
        self.seed_requests = seed_requests
        self.reconnect_seconds = reconnect_seconds
        self.health_seconds = health_seconds
        self.start_seconds = start_seconds
        self._ranks = Ranks()
        self._processes: list[ServerProcess] = []
        self._servers: Servers | None = None
        self._sender: WeightSender | None = None
        self._own_folder: Path | None = None
        self._pending: dict[str, Future[Any]] = {}
        self._finished: queue.SimpleQueue[tuple[Request, Future[Any]]] = queue.SimpleQueue()
        self._policy_version = -1
        self._num_phases = 0
        self._salt = ""

    def start(self, model_path: str, max_context_tokens: int, adapter_rank: int = 0) -> None:
        """Start servers, or find those that run, and see that they serve this model.

        Until ``load_weights`` they sample from the checkpoint. Adapters come merged into the weights.
        """
        self._ranks.open(self.start_seconds + _LOAD_SECONDS)
        self._max_context_tokens = max_context_tokens
        self._policy_version = -1
        try:
            self._start(model_path)
        except BaseException:
            self.close()
            raise

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Stream them in. Raises ``EngineError`` naming a weight that is unknown, misshapen or missing."""
        servers = self._started("load_weights")
        self._policy_version = -1
        incoming = checked(weights, self._shapes, self._names)
        with self._ranks.agreed():
            try:
                if self._ranks.rank == 0:
                    self._sender = self._sender or self._make_sender(servers)
                    self._sender.send(incoming, f"{self._token}:{policy_version}")
            except EngineError as error:
                raise self._explained(error) from error
            finally:
                for _ in incoming:  # sharded weights are put together by all ranks, one weight at a time
                    pass
        servers.token = f"{self._token}:"
        self._policy_version = policy_version

    def begin_phase(self, seed: int) -> None:
        """See that the servers have the right weights. What they cached before is not found any more."""
        servers = self._started("begin_phase")
        if self._pending:
            raise EngineError(f"begin_phase was called with {len(self._pending)} requests pending; call end_phase")
        servers.check_versions()
        servers.forget_sessions()
        self._num_phases += 1
        # the cache is not reset, as other ranks may play already; it finds a prompt with its own salt alone
        self._salt = f"{self._token}:{self._num_phases}:{seed}"

    def end_phase(self) -> None:
        """Give up what is pending."""
        self.abort(list(self._pending))

    def submit(self, request: Request) -> None:
        """Hand it to the server of its session."""
        servers = self._started("submit")
        future = servers.start(servers.generate(request.session, self._body(request)))
        self._pending[request.request_id] = future
        future.add_done_callback(lambda done: self._finished.put((request, done)))

    def step(self) -> list[Completion]:
        """What has finished, or nothing after a hundredth of a second."""
        completions: list[Completion] = []
        expect_running(self._processes)
        with suppress(queue.Empty):
            while self._pending:
                request, future = self._finished.get(timeout=0 if completions else _STEP_SECONDS)
                if self._pending.get(request.request_id) is future:
                    del self._pending[request.request_id]
                    completions.append(self._completion(request, future))
        return completions

    def abort(self, request_ids: Sequence[str]) -> None:
        """Close their connections; the servers give them up then."""
        for request_id in request_ids:
            if future := self._pending.pop(request_id, None):
                future.cancel()

    @property
    def num_pending(self) -> int:
        """Requests submitted and not finished."""
        return len(self._pending)

    @property
    def policy_version(self) -> int:
        """``global_step`` of the weights they sample from."""
        return self._policy_version

    @property
    def description(self) -> str:
        """One line for people."""
        if self._servers is None:
            return "vLLM servers, not started"
        where = ", ".join(self.urls) if self.urls else f"{self.num_servers} of our own"
        return f"vLLM servers ({where}) on {self._facts['device']}, {self._facts['dtype']}"

    def close(self) -> None:
        """End what was started."""
        self.end_phase()
        if self._sender is not None:
            self._sender.close()
        if self._servers is not None:
            self._servers.close()
        for process in self._processes:
            process.end()
        for process in self._processes:
            process.close()
        if self._own_folder is not None:
            shutil.rmtree(self._own_folder, ignore_errors=True)
        self._ranks.close()
        self._sender, self._servers, self._processes, self._own_folder = None, None, [], None
        self._finished = queue.SimpleQueue()
        self._policy_version = -1

    def _start(self, model_path: str) -> None:
        urls = list(self.urls or [])
        with self._ranks.agreed():
            check_model_path(model_path)
            if not urls and self._ranks.rank == 0:
                urls = self._start_processes(model_path)
        urls, self._token = self._ranks.shared((urls, secrets.token_hex(4)))
        with self._ranks.agreed():
            self._connect(urls, model_path)

    def _start_processes(self, model_path: str) -> list[str]:
        check_installed()
        self._own_folder = Path(
            tempfile.mkdtemp(prefix="lit-stepwise-weights-", dir=_weights_folder(self.weights_folder))
        )
        settings = {
            "model_path": str(Path(model_path).resolve()) if Path(model_path).is_dir() else model_path,
            "max_context_tokens": self._max_context_tokens,
            "dtype": self.dtype,
            "weights_backend": self.weights_backend,
            "server_kwargs": {"disable_log_stats": True, **self.server_kwargs},
        }
        for index in range(self.num_servers):
            device = self.devices[index] if self.devices else None
            self._processes.append(ServerProcess(settings, device, folders=[self._own_folder]))
        wait_until_ready(self._processes, self.start_seconds)
        return [process.url for process in self._processes]

    def _connect(self, urls: list[str], model_path: str) -> None:
        from transformers import AutoConfig

        from lit_stepwise.engines.server.client import Servers

        self._servers = Servers(urls, self.reconnect_seconds, self.health_seconds, first=self._ranks.rank)
        try:
            answers = self._servers.call("/collective_rpc", {"method": "lit_stepwise_description"})
            facts = [facts_in(answer) for answer in answers]
        except EngineError as error:
            way_out = "" if self._processes else f"; start it with `lit-stepwise serve --model_path {model_path}`"
            raise EngineError(f"{error}{way_out}") from error
        config = AutoConfig.from_pretrained(model_path)
        for url, each in zip(urls, facts, strict=True):
            check_facts(url, each, config, self._max_context_tokens, self.seed_requests)
        self._facts = facts[0]
        if self._facts["weights_backend"] == "file" and self.weights_folder is None:
            check_here(urls)
        self._shapes, self._names = expected_weights(config.get_text_config())

    def _make_sender(self, servers: Servers) -> WeightSender:
        if self._facts["weights_backend"] == "nccl":
            return NCCLSender(servers)
        folder = self._own_folder or _weights_folder(self.weights_folder)
        return FileSender(servers, folder / f"lit-stepwise-weights-{self._token}.safetensors")

    def _body(self, request: Request) -> dict[str, Any]:
        room = self._max_context_tokens - len(request.prompt_ids)
        if room < 1:
            raise EngineError(
                f"request {request.request_id} has a prompt of {len(request.prompt_ids)} tokens, which leaves no room "
                f"for a response within max_context_tokens={self._max_context_tokens}"
            )
        return request_body(request, min(request.max_new_tokens, room), self._salt, self.seed_requests)

    def _completion(self, request: Request, future: Future[Any]) -> Completion:
        assert self._servers is not None
        try:
            return completion(request, future.result(), self._servers.token)
        except EngineError as error:
            raise self._explained(error) from error

    def _explained(self, error: EngineError) -> EngineError:
        """With the end of a server's log, where there is one."""
        named = [process for process in self._processes if process.url in str(error)] or self._processes
        return EngineError(f"{error}{named[0].tail}") if named else error

    def _started(self, call: str) -> Servers:
        if self._servers is None:
            raise EngineError(f"{call} was called before start")
        return self._servers


def _weights_folder(setting: str | None) -> Path:
    memory = Path("/dev/shm")
    return Path(setting) if setting else memory if memory.is_dir() else Path(tempfile.gettempdir())
