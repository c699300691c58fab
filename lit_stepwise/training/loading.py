"""Models straight into the shards of a strategy: no rank ever holds all the weights of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_stepwise.errors import ConfigError
from lit_stepwise.training.lora import fresh, is_of_adapter, name_of_base
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.training.strategies import Sharding


def load_sharded(
    path: str,
    load: Callable[[bool], PolicyModel],
    prepare: Callable[[PolicyModel], None],
    sharding: Sharding,
    frozen: bool = False,
    offload: bool = False,
) -> PolicyModel:
    """Read a model so that each rank reads, and holds, its part alone.

    Args:
        path: folder or name of a Hugging Face model.
        load: makes it; on the meta device, without weights, if asked so.
        prepare: what is to be done before it is sharded.
        sharding: the strategy.
        frozen: it is not trained.
        offload: between two uses it is in the memory of the CPU.
    """
    model = load(True)
    layers = model.layers
    if not layers:
        kind = model.language_model.config.model_type
        raise ConfigError(f"trainer.strategy cannot shard a model of type {kind}, which names no layers; use ddp")
    files = _tensors_of(path)
    reason = _what_does_not_fit(model, files)
    if reason:
        rank_zero_warn(f"{path}: {reason}, so every rank reads the whole model into the memory of its CPU")
        model = load(False)
        layers = model.layers
    prepare(model)
    fill = None if reason else Filling(model, files)
    # FSDP1 wraps it, and passes on what it is asked for
    return cast(PolicyModel, sharding.shard(model, layers, fill, frozen, offload))


class Filling:
    """Gives modules that were made on the meta device their weights: those of a checkpoint, fresh ones to adapters.

    Args:
        policy: before it is sharded.
        files: where each tensor of the checkpoint is, by its name.
    """

    def __init__(self, policy: PolicyModel, files: Mapping[str, str]) -> None:
        self.names = {module: name for name, module in policy.language_model.named_modules()}
        self.initialise = policy.language_model._init_weights
        self.tied = policy.language_model.all_tied_weights_keys
        self.files = files
        self._open: dict[str, Any] = {}

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> None:
        """Fill its own parameters, of which this rank may have some rows, and its buffers."""
        if module not in self.names:
            return
        if any(True for _ in module.buffers(recurse=False)):
            self.initialise(module)  # they are in no checkpoint
        for of, parameter in module.named_parameters(recurse=False):
            name = f"{self.names[module]}.{of}"
            own, rows = _rows(parameter)
            own.copy_(self._read(name, rows) if not is_of_adapter(name) else fresh(name, parameter.shape)[rows])

    def _read(self, name: str, rows: slice) -> Tensor:
        from safetensors import safe_open

        key = name_of_base(name)
        key = key if key in self.files else self.tied[key]
        file = self.files[key]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        found: Tensor = self._open[file].get_slice(key)[rows]
        return found


def _rows(parameter: Tensor) -> tuple[Tensor, slice]:
    """What this rank has of a parameter, to be written to, and which rows of the whole that is."""
    if not isinstance(parameter, DTensor):
        return parameter, slice(0, len(parameter))
    own = parameter.to_local()
    # as torch.chunk deals them out
    size = -(-len(parameter) // parameter.device_mesh.size())
    start = min(parameter.device_mesh.get_local_rank() * size, len(parameter))
    return own, slice(start, start + len(own))


def _what_does_not_fit(model: PolicyModel, files: Mapping[str, str]) -> str:
    """Why its weights cannot be read one by one from these tensors; empty where they can."""
    if not files:
        return "holds no weights in safetensors"
    tied = model.language_model.all_tied_weights_keys
    for name, parameter in model.language_model.named_parameters():
        if name not in files:
            return f"has no tensor {name}"
        if parameter.ndim == 0:
            return f"has a scalar {name}"
    both = [name for name in tied if name in files]
    return f"has {both[0]} although that is tied to another tensor" if both else ""


def _tensors_of(path: str) -> dict[str, str]:
    """File of each tensor by its name; empty where there is no checkpoint in safetensors."""
    from safetensors import safe_open
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    find = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(path, "model.safetensors.index.json", **find)
    if index is not None:
        files, metadata = get_checkpoint_shard_files(path, index)
        places = {Path(file).name: file for file in files}
        return {name: places[file] for name, file in metadata["weight_map"].items()}
    only = cached_file(path, "model.safetensors", **find)
    if only is None:
        return {}
    with safe_open(only, framework="pt") as file:
        return dict.fromkeys(file.keys(), os.fspath(only))
