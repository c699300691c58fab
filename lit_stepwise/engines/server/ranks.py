"""What the ranks that share servers have to agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lit_stepwise.errors import EngineError

Value = TypeVar("Value")


class Ranks:
    """All ranks of the trainer, or the only one."""

    def __init__(self) -> None:
        self.rank = 0
        self._group: Any = None

    def open(self, seconds: float) -> None:
        """Called by all together: make a process group, in which one may wait so long for another."""
        if dist.is_initialized():
            self.rank = dist.get_rank()
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """An ``EngineError`` on one rank becomes one on all."""
        failure = None
        try:
            yield
        except EngineError as error:
            failure = error
        failures: list[EngineError | None] = [failure]
        if self._group is not None:
            failures = [None] * dist.get_world_size()
            dist.all_gather_object(failures, failure, group=self._group)
        if first := failure or next(filter(None, failures), None):
            raise first

    def shared(self, value: Value) -> Value:
        """That of the first rank."""
        values = [value]
        if self._group is not None:
            dist.broadcast_object_list(values, group=self._group)
        return values[0]

    def close(self) -> None:
        """Give the group back. Idempotent."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None
