"""Files and folders of checkpoints, which are under their name only when they are whole.

::

    step=8.ckpt.part    being written, or half written when the run was killed
    step=8.ckpt         whole, and on the disk
    last.ckpt.old       whole: what a folder of that name was, while another takes its place
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from lit_stepwise.errors import CheckpointError

PART, OLD = ".part", ".old"


def part_of(path: Path) -> Path:
    """Where it is written until it is whole."""
    return path.with_name(path.name + PART)


def put_in_place(part: Path, path: Path) -> None:
    """What is in ``part`` is now ``path``, in the place of what was there; at any time one of them is whole."""
    old = path.with_name(path.name + OLD)
    if path.is_symlink() and part.is_dir():
        path.unlink()
    if path.exists() and (part.is_dir() or path.is_dir()):  # only a file can take the place of a file in one step
        remove(old)
        path.rename(old)
    part.replace(path)
    sync(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """A file or a folder, if it is there. What a kill leaves of a folder has the name of something half written."""
    if path.is_dir() and not path.is_symlink():
        doomed = path if path.suffix == PART else path.rename(part_of(path))
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when the file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def num_bytes(content: Any) -> int:
    """Of all tensors in it that are on this rank."""
    leaves = pytree.tree_leaves(content)
    own = [part for each in leaves if isinstance(each, Tensor | ShardedTensor) for part in _own_parts(each)]
    return sum(each.numel() * each.element_size() for each in own)


def _own_parts(value: Tensor | ShardedTensor) -> list[Tensor]:
    if isinstance(value, ShardedTensor):  # of FSDP1
        return [shard.tensor for shard in value.local_shards()]
    return [value.to_local()] if isinstance(value, DTensor) else [value]


def size_of(path: Path) -> int:
    """Bytes of a file or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file())


@contextmanager
def written(path: Path, size: int) -> Iterator[Path]:
    """Write to the path that it gives, which then takes the place of ``path``.

    Raises ``CheckpointError`` where that fails; what was under ``path`` is as it was, and the part is gone.
    """
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        sync(part)
        put_in_place(part, path)
    except (OSError, RuntimeError) as error:  # torch makes the latter of the former
        remove(part)
        raise not_written(path, size, reason_of(error)) from error


def not_written(path: Path, size: int, reason: str) -> CheckpointError:
    """What to say when there was no way to write ``size`` bytes to ``path``; by now the part is gone."""
    free = shutil.disk_usage(_existing(path.parent)).free
    return CheckpointError(
        f"the checkpoint {path} of {readable(size)} could not be written, with {readable(free)} free there: {reason}; "
        "those before it are as they were: make room, then resume with --ckpt_path last"
    )


def reason_of(error: BaseException) -> str:
    """What went wrong, in a line: what the system said, where torch says something else because of that."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    said = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause or error)
    return next(iter(said.strip().splitlines()), type(error).__name__)


def readable(size: int) -> str:
    """13100000 is 13.1 MB."""
    amount, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def to_host(value: Tensor) -> Tensor:
    """A copy that training will not change, in the memory of the CPU."""
    return value.detach().to("cpu", copy=True)


def torch_save(content: Any, path: Path) -> None:
    """To the disk; nothing of it is put together in memory first."""
    with path.open("wb") as file:
        torch.save(content, file)
