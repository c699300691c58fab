"""How single files are written, as plug-ins of Lightning's Trainer."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils import _pytree as pytree

from lit_stepwise.checkpoints.files import num_bytes, readable, remove, size_of, to_host, torch_save, written
from lit_stepwise.errors import ConfigError

AnyPath = str | Path


class AtomicCheckpointIO(TorchCheckpointIO):
    """A file gets its name when it is whole and on the disk; what had that name before stays until then.

    Lightning's own writes to the folder for temporary files and moves from there, which on another file system is a
    copy that can be cut off. Paths that are not local are left to it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: AnyPath, storage_options: Any | None = None) -> None:
        """Write it. Raises ``CheckpointError`` where that fails, and then changes nothing."""
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with written(Path(path), num_bytes(checkpoint)) as part:
            torch_save(checkpoint, part)

    def load_checkpoint(
        self,
        path: AnyPath,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read it. Raises ``ConfigError`` for a folder."""
        if _is_local(path) and Path(path).is_dir():
            raise ConfigError(
                f"ckpt_path={str(path)!r} is a folder of shards, and trainer.strategy reads single files; use the "
                "strategy that wrote it (fsdp2 or fsdp), which runs on one process, too: --trainer.strategy fsdp2"
            )
        began = time.perf_counter()
        checkpoint = super().load_checkpoint(path, map_location, weights_only)
        if _is_local(path):
            say_read(Path(path), time.perf_counter() - began)
        return checkpoint

    def remove_checkpoint(self, path: AnyPath) -> None:
        """Delete a file or a folder."""
        if _is_local(path):
            remove(Path(path))
        else:
            super().remove_checkpoint(path)


class AsyncCheckpointIO(AtomicCheckpointIO):
    """Writes in a thread while training goes on: a save takes as long as a copy to the memory of the CPU.

    Saves and removals are done one after the other, so that no checkpoint goes before the next one is whole, as it does
    with Lightning's own. A save waits until the one before is written, and raises what that raised.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: AnyPath, storage_options: Any | None = None) -> None:
        """Copy it, and have it written."""
        self._wait()
        if _is_local(path):  # where ModelCheckpoint puts a link before the file is there
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        copy = pytree.tree_map_only(Tensor, to_host, checkpoint)
        self._do(super().save_checkpoint, copy, path, storage_options)

    def remove_checkpoint(self, path: AnyPath) -> None:
        """Have it deleted, unless what is to take its place could not be written."""
        self._do(super().remove_checkpoint, path)

    def teardown(self) -> None:
        """Wait for what is still to be done, and raise what it raised."""
        try:
            self._wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def _do(self, action: Callable[..., None], *arguments: Any) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        before = self._pending[-1] if self._pending else None

        def unless_failed() -> None:
            if before is not None:
                before.result()
            action(*arguments)

        self._pending.append(self._thread.submit(unless_failed))

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for each in pending:
            each.result()


def say_read(path: Path, seconds: float) -> None:
    """On rank 0."""
    rank_zero_info(f"read {path} ({readable(size_of(path))}) in {seconds:.1f} s")


def _is_local(path: AnyPath) -> bool:
    return "://" not in str(path)
