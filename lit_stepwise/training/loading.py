"""Models straight into the shards of a strategy: no rank ever holds all the weights of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from lit_stepwise.errors import ConfigError
from lit_stepwise.training.lora import fresh, is_of_adapter, name_of_base
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.training.sharding import local
from lit_stepwise.training.strategies import Sharding


def load_sharded(
    path: str,
    load: Callable[[str | None], PolicyModel],
    prepare: Callable[[PolicyModel], None],
    sharding: Sharding,
    frozen: bool = False,
    offload: bool = False,
    reads_weights: bool = True,
) -> PolicyModel:
    """Read a model so that each rank reads, and holds, its part alone.

    Args:
        path: folder or name of a Hugging Face model.
        load: makes it; without weights on the device that it is given, if any.
        prepare: what is to be done before it is sharded.
        sharding: the strategy.
        frozen: it is not trained.
        offload: between two uses it is in the memory of the CPU.
        reads_weights: false leaves in its parameters whatever they are made with.
    """
    model = load("meta")
    layers = model.layers
    if not layers:
        kind = model.language_model.config.model_type
        raise ConfigError(f"trainer.strategy cannot shard a model of type {kind}, which names no layers; use ddp")
    if not reads_weights:
        prepare(model)
        return cast(PolicyModel, sharding.shard(model, layers, lambda module: None, frozen, offload))
    files = _tensors_of(path)
    reason = _what_does_not_fit(model, files)
    if reason:
        rank_zero_warn(f"{path}: {reason}, so every rank reads the whole model into the memory of its CPU")
        model = load(None)
        layers = model.layers
    prepare(model)
    fill = None if reason else Filling(model, files)
    # FSDP1 wraps it, and passes on what it is asked for
    return cast(PolicyModel, sharding.shard(model, layers, fill, frozen, offload))


def give_memory(model: nn.Module, device: torch.device) -> None:
    """To what is on the meta device, whatever that memory holds; parameters that modules share stay shared.

    ``to_empty`` does neither with fake tensors.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            real = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            setattr(module, name, made.setdefault(id(parameter), real))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, torch.empty_like(buffer, device=device))


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
        """Fill its own parameters, of which this rank may have a part, and its buffers."""
        if module not in self.names:
            return
        if any(True for _ in module.buffers(recurse=False)):
            self.initialise(module)  # they are in no checkpoint
        for of, parameter in module.named_parameters(recurse=False):
            name = f"{self.names[module]}.{of}"
            part = part_of(parameter)
            local(parameter).copy_(
                self._read(name, part) if not is_of_adapter(name) else fresh(name, parameter.shape)[part]
            )

    def _read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        from safetensors import safe_open

        key = name_of_base(name)
        key = key if key in self.files else self.tied[key]
        file = self.files[key]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        found: Tensor = self._open[file].get_slice(key)[part]
        return found


def part_of(parameter: Tensor) -> tuple[slice, ...]:
    """Which part of the whole this rank has."""
    spans = [(0, size) for size in parameter.shape]
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        # what the ranks of a layer split they have split before the rest, and it is the last dimension of the mesh
        for number, placement in reversed([*enumerate(parameter.placements)]):
            if not placement.is_replicate():
                dim = cast(Shard, placement).dim
                spans[dim] = chunk(*spans[dim], mesh.size(number), mesh.get_local_rank(number))
    return tuple(slice(start, stop) for start, stop in spans)


def chunk(start: int, stop: int, number: int, index: int) -> tuple[int, int]:
    """As ``torch.chunk`` deals them out."""
    size = -(-(stop - start) // number)
    return min(start + index * size, stop), min(start + (index + 1) * size, stop)


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
