"""Models of which each rank may hold a part: how to see them whole, and what has to be done on all ranks at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor

_WRAPPER = "_fsdp_wrapped_module."


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that can be seen whole at the same time; all ranks go through the same in the same order."""

    parameters: Mapping[str, Tensor]
    """By the names they have in the model as it is without sharding."""
    borrowed: bool
    """They are whole for as long as this unit is the present one."""

    def whole(self, name: str) -> Tensor:
        """Without gradient, to keep. Where it is sharded it is put together, which all ranks do at the same time."""
        value = self.parameters[name].detach()
        if isinstance(value, DTensor):
            # what was offloaded travels between devices, not between their hosts
            shards = cast(DTensor, value.to(value.device_mesh.device_type))
            return shards.full_tensor()
        return value.clone() if self.borrowed else value


def units_of(model: nn.Module) -> Iterator[Unit]:
    """All parameters of ``model``, each once. Every rank goes through all of them."""
    reshard(model)
    if not isinstance(model, FSDP1):
        yield Unit(dict(model.named_parameters()), borrowed=False)
        return
    owners: dict[str, FSDP1] = {}
    for name, module in model.named_modules():
        owners[name] = module if isinstance(module, FSDP1) else owners[name.rpartition(".")[0]]
    # the root first: whichever is used first takes itself for the root
    for unit in dict.fromkeys(owners.values()):
        with FSDP1.summon_full_params(unit, recurse=False, writeback=False):
            yield Unit(_own_parameters(model, {name for name, owner in owners.items() if owner is unit}), borrowed=True)


def _own_parameters(model: nn.Module, modules: set[str]) -> dict[str, Tensor]:
    """Of those ``modules`` alone, each parameter under the first name that it has."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in model.named_modules():
        if name in modules and not isinstance(module, FSDP1):
            for of, parameter in module.named_parameters(recurse=False):
                found.setdefault(id(parameter), (plain_name(f"{name}.{of}"), parameter))
    return dict(found.values())


def plain_name(name: str) -> str:
    """That of a module or a parameter in the model as it is without sharding."""
    return name.removesuffix(_WRAPPER[:-1]).removesuffix(".").replace(_WRAPPER, "")


def reshard(model: nn.Module) -> None:
    """Give up weights that were put together for a forward pass and kept for a backward pass that never came."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def set_gradient_sync(model: nn.Module, on: bool) -> None:
    """Whether backward passes of what is under FSDP2 sum and shard gradients, or add them up whole on each rank."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(on, recurse=False)


def local(tensor: Tensor) -> Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those that the same ranks share together, for operations on several at a time."""
    groups: dict[Any, list[Tensor]] = {}
    for each in parameters:
        groups.setdefault(each.device_mesh if isinstance(each, DTensor) else None, []).append(each)
    return list(groups.values())


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Norm of the whole gradient, the same on every rank, before it was clipped to ``max_norm``."""
    if isinstance(model, FSDP1):
        return model.clip_grad_norm_(max_norm)
    groups = _by_mesh(each for each in model.parameters() if each.grad is not None)
    norms = [torch.nn.utils.get_total_norm([each.grad for each in group if each.grad is not None]) for group in groups]
    # of shards it is as yet each rank's own part
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = whole[0] if len(whole) == 1 else torch.nn.utils.get_total_norm(whole)
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
