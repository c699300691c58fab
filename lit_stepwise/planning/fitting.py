"""What does not fit, and the one setting that would make it fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from lit_stepwise.planning.assumptions import Assumptions
from lit_stepwise.planning.engine import EngineRoom
from lit_stepwise.planning.iteration import Shape
from lit_stepwise.planning.machine import GIB, Machine
from lit_stepwise.planning.memory import RankMemory, Training
from lit_stepwise.training.strategies import FSDP2Strategy, Sharding

_STEP_TOKENS = 1024
"""What a proposed number of tokens is a multiple of."""
_DEVICES = (2, 4, 8)
"""Of a node, that are proposed."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of a rank's device at the two times of an iteration that differ."""

    update: float
    """In an optimizer step, while the engine sleeps where it can."""
    play: float
    available: float

    @property
    def fits(self) -> bool:
        """Both do."""
        return max(self.update, self.play) <= self.available


@dataclass(frozen=True, slots=True)
class Change:
    """One setting that is another, and with it what the memory of an update depends on."""

    setting: str
    training: Training
    shape: Shape


def needs_of(memory: RankMemory, room: EngineRoom, machine: Machine, assume: Assumptions) -> Needs:
    """Memory, engine and, on a GPU, what CUDA takes."""
    overhead = assume.overhead_gib * GIB if machine.kind == "gpu" else 0.0
    return Needs(
        update=memory.peak + room.asleep + overhead,
        play=memory.held + room.awake + overhead,
        available=machine.memory_per_rank,
    )


def way_out_of_update(
    training: Training, shape: Shape, memory: RankMemory, needs: Needs, try_out: Callable[[Change], Needs]
) -> str:
    """The first change with which ``try_out`` finds that an optimizer step fits; one line."""
    at = f"an optimizer step needs {_gib(needs.update)} of the {_gib(needs.available)} of a rank"
    for change in _changes(training, shape, memory, needs):
        found = try_out(change)
        if found.update <= found.available:
            return f"{at}; use {change.setting}, which by plan needs {_gib(found.update)}"
    return (
        f"{at}, with rollout.limits.max_context_tokens={shape.limits.max_context_tokens} and no single setting makes "
        "it fit; a sample is never split over ranks (no context parallelism), so use a smaller model, or model.lora"
    )


def way_out_of_play(room: EngineRoom, needs: Needs, machine: Machine, max_context_tokens: int) -> str:
    """Another share for the engine, or more devices for one; one line. Empty where all have room enough."""
    setting = f"rollout.engine.init_args.{room.setting}"
    now = f"{setting}={_share(room, machine, room.awake, lambda share: share)}"
    least = room.weights + room.overhead + room.bytes_per_token * max_context_tokens
    most = room.awake - (needs.play - needs.available)
    if needs.play > needs.available:
        said = (
            f"{now}: play needs {_gib(needs.play)} of the {_gib(needs.available)} of a rank, which holds the trainer's "
            "weights, gradients and optimizer states besides"
        )
        better = _share(room, machine, most, math.floor)
    elif room.tokens < max_context_tokens:
        said = (
            f"{now} leaves a cache for {room.tokens} tokens, and a sequence has up to rollout.limits."
            f"max_context_tokens={max_context_tokens}"
        )
        better = _share(room, machine, least, math.ceil)
    else:
        return ""
    if least <= most - machine.memory / 100:  # shares are rounded to a hundredth
        return f"{said}; use {better}"
    wider = 2 * room.num_devices
    if machine.num_ranks % wider == 0 and least - (least - room.overhead) / 2 <= most:
        return f"{said}; use rollout.engine.init_args.tensor_parallel_size={wider}"
    return f"{said}; use more devices (trainer.devices, trainer.num_nodes), or a smaller model"


def _share(room: EngineRoom, machine: Machine, awake: float, rounded: Callable[[float], float]) -> str:
    """What the setting of an engine has to be for so many bytes of a device."""
    if room.setting == "gpu_memory_utilization":
        return f"{rounded(100 * awake / machine.memory) / 100:.3g}"
    return f"{rounded((awake - room.weights - room.overhead) / 2**20):.0f}"


def _changes(training: Training, shape: Shape, memory: RankMemory, needs: Needs) -> Iterator[Change]:
    """From the cheapest on."""
    module, machine = training.module, training.machine
    if not module.activation_checkpointing:
        yield Change("model.activation_checkpointing=true", _with(training, activation_checkpointing=True), shape)
    tokens = _affordable(memory, needs)
    if shape.limits.max_context_tokens <= tokens < shape.max_tokens:
        setting = f"model.max_tokens_per_micro_batch={tokens}"
        yield Change(setting, _with(training, max_tokens_per_micro_batch=tokens), replace(shape, max_tokens=tokens))
    if not _shards(training.strategy) and machine.num_ranks > 1:
        sharded = replace(training, strategy="fsdp2", precision="32-true")
        yield Change("trainer.strategy=fsdp2 (with trainer.precision=32-true)", sharded, shape)
    if _shards(training.strategy):
        yield from _more_devices(training, shape)
        if machine.kind == "gpu" and not getattr(training.strategy, "cpu_offload", False):
            offloading = replace(training, strategy=_offloading(training.strategy))
            yield Change("trainer.strategy.init_args.cpu_offload=true (FSDP2Strategy)", offloading, shape)
    if 0 < tokens < shape.limits.max_context_tokens and tokens > shape.limits.max_prompt_tokens:
        limits = replace(shape.limits, max_context_tokens=tokens)
        setting = f"rollout.limits.max_context_tokens={tokens} (and model.max_tokens_per_micro_batch with it)"
        smaller = replace(shape, limits=limits, max_tokens=tokens)
        yield Change(setting, _with(training, max_tokens_per_micro_batch=tokens), smaller)


def _more_devices(training: Training, shape: Shape) -> Iterator[Change]:
    machine = training.machine
    for count in (each for each in _DEVICES if each > machine.num_devices and each % training.ranks_per_layer == 0):
        larger = replace(training, machine=replace(machine, num_devices=count))
        yield Change(f"trainer.devices={count}", larger, replace(shape, num_shares=larger.num_shares))
    for nodes in (2 * machine.num_nodes, 4 * machine.num_nodes):
        larger = replace(training, machine=replace(machine, num_nodes=nodes))
        yield Change(f"trainer.num_nodes={nodes}", larger, replace(shape, num_shares=larger.num_shares))


def _affordable(memory: RankMemory, needs: Needs) -> int:
    """Tokens whose activations fit, if these grow with the tokens and nothing else does."""
    fixed = needs.update - memory.activations + memory.head
    per_token = max(memory.activations - memory.head, 1) / memory.num_tokens
    return int((needs.available - fixed) / per_token) // _STEP_TOKENS * _STEP_TOKENS


def _with(training: Training, **settings: Any) -> Training:
    module = copy(training.module)
    for name, value in settings.items():
        setattr(module, name, value)
    return replace(training, module=module)


def _shards(strategy: Any) -> bool:
    return strategy in ("fsdp2", "fsdp") or isinstance(strategy, Sharding)


def _offloading(strategy: Any) -> FSDP2Strategy:
    names = ("param_dtype", "reduce_dtype", "reshard_after_forward", "reduce_every_micro_batch")
    given = {name: getattr(strategy, name) for name in names if hasattr(strategy, name)}
    return FSDP2Strategy(**given, cpu_offload=True)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
