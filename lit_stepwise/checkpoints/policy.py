"""What a checkpoint holds of a policy, for those who only want its weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lit_stepwise.checkpoints.files import reason_of
from lit_stepwise.checkpoints.finding import flaw_of, read_rest
from lit_stepwise.errors import ConfigError

_POLICY = "policy.language_model."
_KEYS = ("state_dict.", "model.")
"""What ModelParallelStrategy and FSDPStrategy put before the names of weights in a folder of shards."""


@dataclass(frozen=True)
class Checkpoint:
    """A policy at rest."""

    path: Path
    step: int
    """``global_step`` of the weights."""
    weights: Mapping[str, Tensor]
    """By their names in the language model. Those of a single file stay in it until they are used."""

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """The weights by their names in the Lightning module."""
        return {_POLICY + name: value for name, value in self.weights.items()}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file, or a folder of shards that any number of ranks wrote; without the state of the optimizer.

    Raises ``ConfigError`` where nothing is there, it is not whole, or it holds no policy.
    """
    if not path.exists():
        raise ConfigError(f"the checkpoint {path} does not exist; give the path of one")
    if flaw := flaw_of(path):
        raise ConfigError(f"the checkpoint {path} {flaw}; give one that is whole")
    try:
        weights = _of_shards(path) if path.is_dir() else _of_file(path)
        step = int(read_rest(path)["global_step"])
    except Exception as error:  # of many kinds, where something is not what it seems
        raise ConfigError(
            f"the checkpoint {path} cannot be read ({type(error).__name__}: {reason_of(error)}); give one that is whole"
        ) from error
    if not weights:
        raise ConfigError(
            f"the checkpoint {path} holds no policy: no weight in it is called {_POLICY}...; give one that "
            "lit-stepwise fit wrote"
        )
    return Checkpoint(path, step, weights)


def _of_file(path: Path) -> dict[str, Tensor]:
    weights = read_rest(path).get("state_dict", {})
    return {name.removeprefix(_POLICY): weights[name] for name in weights if name.startswith(_POLICY)}


def _of_shards(path: Path) -> dict[str, Tensor]:
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
    return {name.split(_POLICY, 1)[1]: value for name, value in weights.items()}
