"""Several ranks as one engine: the leader tells the others what it was asked, and all of them do the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lit_stepwise.errors import ConfigError, EngineError
from lit_stepwise.types import Request

_PATIENCE = timedelta(days=1)  # a leader with nothing to compute waits as long as its environments may take
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Orders:
    """What the ranks of an engine do before they step once more."""

    submitted: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    """Ids of requests; carried out first."""
    last: bool = False
    """The phase is over: no step comes after."""


class EngineRanks:
    """The ranks that one engine spans; every rank of the run makes it together."""

    def __init__(self, size: int) -> None:
        """Raises ``ConfigError`` when the run's ranks do not make whole engines of ``size`` ranks."""
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        if size < 1 or num_ranks % size:
            works = ", ".join(str(each) for each in range(1, num_ranks + 1) if num_ranks % each == 0)
            raise ConfigError(
                f"rollout.engine.tensor_parallel_size={size} does not divide {num_ranks} ranks (trainer.devices times "
                f"trainer.num_nodes); these do: {works}"
            )
        self.size = size
        self.first = dist.get_rank() // size * size if size > 1 else 0
        self.leads = size == 1 or dist.get_rank() == self.first
        self._group: Any = None
        if size > 1:
            self._group, _ = dist.new_subgroups(size, timeout=_PATIENCE, backend="gloo")  # type: ignore[no-untyped-call]

    def tell(self, orders: Orders) -> None:
        """On the leader: what to do next. Raises ``EngineError`` when a follower died or could not do the last."""
        if self.size == 1:
            return
        failures = [f"rank {self.first + i}: {each}" for i, each in enumerate(self._exchange(orders)) if i and each]
        if failures and not orders.last:
            raise EngineError(f"the engine failed on another of its ranks; {'; '.join(failures)}")

    def hear(self, failure: Exception | None) -> Orders:
        """On a follower: what to do next. ``failure`` is why it could not do the last, for the leader."""
        orders: Orders = self._exchange(failure and str(failure))[0]
        return orders

    @contextmanager
    def shared_memory(self) -> Iterator[None]:
        """For the start of vLLM, whose ranks on a CPU talk through files that have the same names in every run.

        What a run that was killed left behind is removed before, and once all ranks have them open, so are ours.
        Raises ``EngineError`` when a run that is starting uses them.
        """
        if self.size == 1:
            yield
            return
        if failure := self._exchange(self._clear_stale() if self.leads else "")[0]:
            raise EngineError(failure)
        try:
            yield
        finally:
            for path in self._shared_files() if self.leads else ():
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def _shared_files(self) -> list[Path]:
        ranks = "-".join(str(self.first + i) for i in range(self.size))
        return sorted(_SHARED_MEMORY.glob(f"*-tp:*[[]{ranks}[]]-cpushm_*"))

    def _clear_stale(self) -> str:
        for path in self._shared_files():
            owner = _who_maps(path)
            if owner is not None:
                return f"{path} belongs to a run that is starting (process {owner}); start one after the other"
            path.unlink(missing_ok=True)
        return ""

    def _exchange(self, mine: object) -> list[Any]:
        everyones: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(everyones, mine, group=self._group)
        except RuntimeError as error:  # gloo notices at once when a process is gone
            raise EngineError(f"another rank of this engine (from rank {self.first} on) is gone: {error}") from error
        return everyones


def _who_maps(path: Path) -> int | None:
    import psutil  # type: ignore[import-untyped]

    for process in psutil.process_iter():
        try:
            if any(each.path == str(path) for each in process.memory_maps()):
                return int(process.pid)
        except psutil.Error:  # it ended meanwhile, or belongs to somebody else
            continue
    return None
