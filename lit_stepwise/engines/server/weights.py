"""New weights for vLLM servers, while they play: the trainer's side."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_stepwise.errors import EngineError

if TYPE_CHECKING:
    from lit_stepwise.engines.server.client import Servers

_LEAVE_SECONDS = 10.0
PIECE_BYTES = 256 << 20
"""Weights travel in pieces of about this size, so that there is never a second copy of all of them."""


class WeightSender(ABC):
    """Sends weights to all servers at once. Used by the first rank alone."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers

    def send(self, weights: Iterable[tuple[str, Tensor]], label: str) -> None:
        """Send them, and let the servers go on with them under ``label``; what is being sampled waits meanwhile.

        Raises ``EngineError`` when a server fails, or does not take them. It samples nothing then until it has got
        others.
        """
        call = self._servers.call
        call("/pause?mode=keep&clear_cache=false")  # the cache is reset below, when there is nothing old to put in it
        call("/update_weight_version", {"new_version": f"{label}, unfinished"})
        self._begin()
        for piece in pieces(weights, PIECE_BYTES):
            self._send_piece(piece)
        call("/finish_weight_update")
        for answer in call("/reset_prefix_cache?reset_running_requests=true"):
            if not (answer or {}).get("success"):
                raise EngineError("a vLLM server did not reset its prefix cache, which holds what old weights computed")
        call("/update_weight_version", {"new_version": label})
        call("/resume")

    def close(self) -> None:
        """Give up what both sides share."""

    def _begin(self) -> None:
        try:
            self._servers.call("/start_weight_update")
        except EngineError:  # another trainer, or this one, left an update unfinished
            self._servers.call("/finish_weight_update")
            self._servers.call("/start_weight_update")

    @abstractmethod
    def _send_piece(self, piece: dict[str, Tensor]) -> None: ...


class FileSender(WeightSender):
    """Through files in memory, or on a disk that the servers share with this machine."""

    def __init__(self, servers: Servers, path: Path) -> None:
        """``path`` is where a file lies while it is loaded."""
        super().__init__(servers)
        self._path = path

    def _send_piece(self, piece: dict[str, Tensor]) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(_plain(piece), self._path)
            self._servers.call("/update_weights", {"update_info": {"path": str(self._path)}})
        except (OSError, SafetensorError) as error:
            raise EngineError(f"weights_folder={self._path.parent} cannot be written: {error}") from error
        finally:
            self._path.unlink(missing_ok=True)


class NCCLSender(WeightSender):
    """From GPU to GPU, by vLLM's own trainer side: one round of it for each piece."""

    def __init__(self, servers: Servers) -> None:
        """Meet the servers' workers in a process group of their own."""
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        super().__init__(servers)
        if not torch.cuda.is_available():
            raise EngineError("weights_backend=nccl needs a GPU in the first rank; use file")
        self._device = torch.cuda.current_device()
        self._source = PieceSource()
        self._num_workers = [answer["world_size"] for answer in servers.call("/get_world_size", get=True)]
        meeting = NCCLTrainerInitInfo(get_ip(), get_open_port(), 1 + sum(self._num_workers), rank=0)
        self._trainer = self._beside(
            lambda client: WeightTransferTrainerFactory.trainer_init(meeting, client=client, source=self._source)
        )

    def close(self) -> None:
        """Leave the process group, as far as the servers still can."""
        with suppress(Exception):
            self._servers.call("/shutdown_weight_transfer_engine")
        with suppress(Exception):
            self._beside(lambda client: self._trainer.shutdown(), _LEAVE_SECONDS)

    def _send_piece(self, piece: dict[str, Tensor]) -> None:
        self._source.piece = piece

        def send(client: PieceClient) -> None:
            self._trainer.client = client
            self._trainer.send_weights()

        self._beside(send)

    def _beside(self, action: Callable[[PieceClient], Any], seconds: float | None = None) -> Any:
        """Run it in a thread that may hang: NCCL waits forever for a server that is gone, of which the client hears."""
        outcome: Future[Any] = Future()

        def run() -> None:
            torch.cuda.set_device(self._device)
            try:
                result = action(PieceClient(self._servers, self._num_workers, outcome))
            except Exception as error:
                settle(outcome, error)
            else:
                settle(outcome, result)

        threading.Thread(target=run, name="vllm-weights", daemon=True).start()
        return outcome.result(seconds)


class PieceClient:
    """What vLLM's trainer side calls, for several servers at a time; begin and end of an update are not its affair."""

    def __init__(self, servers: Servers, num_workers: list[int], outcome: Future[Any]) -> None:
        """Remember where failures go, of which the thread that sends may never hear."""
        self._servers = servers
        self._num_workers = num_workers
        self._outcome = outcome

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The workers of each server have their ranks after those of the servers before it."""
        first = init_info["rank_offset"]
        offsets = [first + sum(self._num_workers[:index]) for index in range(len(self._num_workers))]
        each = [{"init_info": {**init_info, "rank_offset": offset}} for offset in offsets]
        self._call("/init_weight_transfer_engine", each)

    def start_weight_update(self) -> None:
        """Done already."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The servers receive, until all is there."""
        self._call("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Done when all pieces are there."""

    def _call(self, path: str, bodies: Any) -> None:
        try:
            self._servers.call(path, bodies)
        except EngineError as error:
            settle(self._outcome, error)
            raise


class PieceSource:
    """One piece of the weights, as a ``WeightSource`` of vLLM."""

    def __init__(self) -> None:
        self.piece: dict[str, Tensor] = {}

    def metadata(self) -> list[Any]:
        """Name, precision and shape of each weight."""
        from vllm.distributed.weight_transfer import ParamMeta

        return [ParamMeta(name, weight.dtype, tuple(weight.shape)) for name, weight in self.piece.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.piece.items())


def pieces(weights: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Cut them so that a piece ends with the weight that brings it to ``max_bytes``."""
    piece: dict[str, Tensor] = {}
    num_bytes = 0
    for name, weight in weights:
        piece[name] = weight
        num_bytes += weight.nbytes
        if num_bytes >= max_bytes:
            yield piece
            piece, num_bytes = {}, 0
    if piece:
        yield piece


def settle(outcome: Future[Any], result: Any) -> None:
    """The first result, or exception, counts."""
    if not outcome.done():
        outcome.set_exception(result) if isinstance(result, Exception) else outcome.set_result(result)


def _plain(piece: dict[str, Tensor]) -> dict[str, Tensor]:
    """In memory of their own, one after the other, as safetensors wants them."""
    seen: set[int] = set()
    plain = {}
    for name, weight in piece.items():
        place = weight.untyped_storage().data_ptr()
        plain[name] = weight.clone(memory_format=torch.contiguous_format) if place in seen else weight.contiguous()
        seen.add(place)
    return plain
