"""What a Lightning checkpoint holds of a policy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lit_stepwise.errors import ConfigError

_POLICY = "policy.language_model."
_KEYS = ("state_dict.", "model.")
"""What ModelParallelStrategy and FSDPStrategy put before the names of weights in a folder of shards."""
_INDEX, _REST = ".metadata", "meta.pt"
"""The files of that folder which say what lies where, and hold all but weights and optimizers; written in the end."""


@dataclass(frozen=True)
class Checkpoint:
    """A policy at rest."""

    path: Path
    step: int
    """``global_step`` of the weights."""
    weights: Mapping[str, Tensor]
    """By their names in the language model. Those of a single file stay in it until they are used."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file, or a folder of shards that any number of ranks wrote; without the state of the optimizer.

    Raises ``ConfigError`` where nothing is there, it is not whole, or it holds no policy.
    """
    if not path.exists():
        raise ConfigError(f"the checkpoint {path} does not exist; give the path of one")
    with _saying_what_is_wrong_with(path):
        rest, weights = _read_shards(path) if path.is_dir() else _read_file(path)
        if not weights:
            raise ConfigError(
                f"the checkpoint {path} holds no policy: no weight in it is called {_POLICY}...; give one that "
                "lit-stepwise fit wrote"
            )
        return Checkpoint(path, int(rest["global_step"]), weights)


@contextmanager
def _saying_what_is_wrong_with(path: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of many kinds, where something is missing or is not what it seems
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ConfigError(
            f"the checkpoint {path} cannot be read; give one that is whole ({type(error).__name__}: {reason})"
        ) from error


def _read_file(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    if not is_zipfile(path):  # its table of contents is at the end
        raise ConfigError(f"the checkpoint {path} is cut off, or is none at all; give one that is whole")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    weights = content.get("state_dict", {})
    return content, {name.removeprefix(_POLICY): weights[name] for name in weights if name.startswith(_POLICY)}


def _read_shards(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    for name in (_INDEX, _REST):
        if not (path / name).is_file():
            raise ConfigError(
                f"the checkpoint {path} has no {name}, so it is half written, or no folder of shards at all; give one "
                "that is whole"
            )
    reader = FileSystemReader(path)
    prefixes = tuple(key + _POLICY for key in _KEYS)
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefixes) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what is wanted
        try:
            load(weights, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # no Exception, but around one, or around a KeyboardInterrupt
            raise next(iter(error.failures.values()))[0] from error
    rest = torch.load(path / _REST, map_location="cpu", weights_only=True)
    return rest, {name.split(_POLICY, 1)[1]: value for name, value in weights.items()}
