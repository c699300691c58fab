"""Folders to which every rank writes its part, and how another model, or another number of ranks, reads them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lit_stepwise.checkpoints.files import (
    not_written,
    num_bytes,
    part_of,
    put_in_place,
    reason_of,
    remove,
    sync,
)
from lit_stepwise.checkpoints.finding import REST, flaw_of, read_rest
from lit_stepwise.checkpoints.plugins import AnyPath, say_read
from lit_stepwise.errors import ConfigError


class WholeShards(ParallelStrategy):
    """What a strategy does so that a folder of shards has its name only when all ranks have written all of it."""

    weights_key: ClassVar[str]
    """What the strategy puts before the names of weights in such a folder."""
    save_distributed_checkpoint: bool

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: AnyPath, storage_options: Any | None = None
    ) -> None:
        """Write it. Raises ``CheckpointError`` on all ranks where one of them fails, and then changes nothing."""
        path = Path(self.broadcast(filepath))
        if not self.save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        part, size = part_of(path), num_bytes(checkpoint)
        failure = ""
        try:
            if self.is_global_zero:
                remove(part)
            self.barrier()
            super().save_checkpoint(checkpoint, part, storage_options)
            if self.is_global_zero:
                sync(part / REST)
                sync(part)
        except (CheckpointException, OSError, RuntimeError) as error:
            failure = _reason(error)
        self._raise_together(failure, path, size)
        if self.is_global_zero:
            put_in_place(part, path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: AnyPath, weights_only: bool | None = None) -> dict[str, Any]:
        """Read it, whoever wrote it. Raises ``ConfigError`` where it is not whole, or of another model."""
        path = Path(self.broadcast(checkpoint_path))
        began = time.perf_counter()
        if flaw := flaw_of(path):
            raise ConfigError(f"ckpt_path={str(path)!r} {flaw}; give one that is whole, or 'last'")
        ours, theirs = self.shapes(), _shapes_in(path, self.weights_key)
        # where weights are saved in a single file rank 0 alone has their shapes
        if difference := self.broadcast(different_architecture(theirs, ours, self._model_path)):
            raise ConfigError(difference)
        try:
            checkpoint: dict[str, Any] = super().load_checkpoint(path, weights_only)
        except (CheckpointException, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"ckpt_path={str(path)!r} cannot be read by trainer.strategy={type(self).__name__} on "
                f"{self.world_size} processes: {_reason(error)}; use the strategy and the number of processes that "
                "wrote it"
            ) from error
        say_read(path, time.perf_counter() - began)
        return checkpoint

    def teardown(self) -> None:
        """Single files may still be being written."""
        super().teardown()
        self.checkpoint_io.teardown()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights as they are without sharding, by name."""
        return {name: tuple(value.shape) for name, value in self.lightning_module_state_dict().items()}

    @property
    def _model_path(self) -> str:
        return str(getattr(self.lightning_module, "model_path", ""))

    def _raise_together(self, failure: str, path: Path, size: int) -> None:
        """Where any rank has failed all raise, so that none waits for one that is gone."""
        failures: list[str] = [""] * self.world_size
        sizes = [0] * self.world_size
        dist.all_gather_object(failures, failure)
        dist.all_gather_object(sizes, size)
        if not any(failures):
            return
        if self.is_global_zero:
            remove(part_of(path))
        self.barrier()
        raise not_written(path, sum(sizes), next(filter(None, failures)))


def different_architecture(
    theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]], model_path: str
) -> str:
    """What to say where names or shapes of weights in a checkpoint are not those of the model; else nothing."""
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if not differing:
        return ""
    name = differing[0]
    return (
        f"ckpt_path holds another architecture than model.model_path={model_path!r}: {len(differing)} tensors differ, "
        f"the first {name} with shape {theirs.get(name)} there and {ours.get(name)} here; give the checkpoint of this "
        "model, or the model of this checkpoint"
    )


def _shapes_in(path: Path, weights_key: str) -> dict[str, tuple[int, ...]]:
    """Of the weights in a file or a folder. Raises ``ConfigError`` for a folder that the other strategy wrote."""
    if not path.is_dir():
        return {name: tuple(value.shape) for name, value in read_rest(path)["state_dict"].items()}
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    prefix = f"{weights_key}."
    shapes = {
        name.removeprefix(prefix): tuple(entry.size)
        for name, entry in entries.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not shapes:
        raise ConfigError(
            f"ckpt_path={str(path)!r} was written by the other strategy that shards; resume with that one (fsdp2 or "
            "fsdp)"
        )
    return shapes


def _reason(error: BaseException) -> str:
    """What went wrong, of whichever rank, in a line."""
    if isinstance(error, CheckpointException):  # no Exception, but around one of each rank that failed
        error = next(iter(error.failures.values()))[0]
    return reason_of(error)
