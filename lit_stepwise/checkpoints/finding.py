"""Which checkpoints there are, and whether they are whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.checkpoint.filesystem import FileSystemReader

from lit_stepwise.checkpoints.files import OLD, PART, readable, size_of
from lit_stepwise.errors import ConfigError

INDEX, REST = ".metadata", "meta.pt"
"""The files of a folder of shards which say what lies where, and hold all but weights and optimizers."""


def find_checkpoint(ckpt_path: str | Path | None, folders: Sequence[Path], to_train: bool) -> Path | None:
    """``last`` becomes the newest whole checkpoint of any run below ``folders``, or None when there was never one.

    Raises ``ConfigError`` for a path where there is no whole checkpoint, or with ``to_train`` none to train on from.
    """
    if ckpt_path == "last":
        return _newest(folders, to_train)
    if ckpt_path is None:
        return None
    path = Path(ckpt_path)
    if not path.exists():
        raise ConfigError(f"ckpt_path={str(path)!r} does not exist; give a checkpoint, or 'last'")
    if flaw := flaw_of(path, to_train):
        raise ConfigError(f"ckpt_path={str(path)!r} {flaw}; give one that is whole, or 'last' for the newest of these")
    return path


def flaw_of(path: Path, to_train: bool = False) -> str:
    """What is wrong with it, as the end of a sentence; empty where nothing is. Weights are not read."""
    try:
        if path.is_dir():
            flaw = _flaw_of_shards(path)
        else:  # the table of contents of a file is at its end
            flaw = "" if is_zipfile(path) else "is cut off, or no checkpoint at all"
        if not flaw and to_train and "lr_schedulers" not in read_rest(path):
            flaw = "holds weights alone, so that training cannot go on from it"
    except Exception as error:  # of many kinds, where something is not what it seems
        reason = next(iter(str(error).strip().splitlines()), "")
        flaw = f"cannot be read ({type(error).__name__}: {reason})"
    return flaw


def read_rest(path: Path) -> Mapping[str, Any]:
    """All that it holds but weights and optimizers; those of a single file stay in it until they are used."""
    content: Mapping[str, Any] = torch.load(
        path / REST if path.is_dir() else path, map_location="cpu", weights_only=True, mmap=True
    )
    return content


def _flaw_of_shards(folder: Path) -> str:
    for name in (INDEX, REST):
        if not (folder / name).is_file():
            return f"has no {name}, so it is half written, or no folder of shards at all"
    ends: dict[str, int] = {}
    for place in (FileSystemReader(folder).read_metadata().storage_data or {}).values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in ends.items():
        size = (folder / name).stat().st_size if (folder / name).exists() else 0
        if size < end:
            return f"has only {readable(size)} of the {readable(end)} of its {name}"
    return ""


def _newest(folders: Sequence[Path], to_train: bool) -> Path | None:
    """Says what it finds, and what it passes over."""
    where = " and ".join(str(folder) for folder in folders)
    damaged = ""
    for path in _newest_first(folders):
        if path.name.endswith(PART):
            rank_zero_warn(
                f"ckpt_path=last: {path} was still being written when its run ended, and is passed over; it may be "
                f"deleted ({readable(size_of(path))})"
            )
        elif flaw := flaw_of(path, to_train):
            rank_zero_warn(f"ckpt_path=last: {path} {flaw}, and is passed over")
            damaged = damaged or f"{path} {flaw}"
        else:
            rank_zero_info(f"ckpt_path=last: resuming from {path}, step {read_rest(path)['global_step']}")
            return path
    if damaged:
        raise ConfigError(
            f"ckpt_path=last: below {where} there is no checkpoint to go on from, and {damaged}; give the path of "
            "another one, or leave out --ckpt_path to begin anew"
        )
    rank_zero_info(f"ckpt_path=last: no checkpoint below {where}, so this is a fresh start")
    return None


def _newest_first(folders: Sequence[Path]) -> list[Path]:
    """Of checkpoints of the same time, the one that is called last comes first."""
    names = ("*.ckpt", f"*.ckpt{OLD}", f"*.ckpt{PART}")
    found = {path for folder in folders for name in names for path in folder.glob(f"**/{name}") if path.exists()}
    return sorted(found, key=lambda path: (_time_of(path), path.name.startswith("last")), reverse=True)


def _time_of(path: Path) -> float:
    """When it was written; the time of a folder changes with what is deleted in it."""
    rest = path / REST
    return (rest if rest.exists() else path).stat().st_mtime
