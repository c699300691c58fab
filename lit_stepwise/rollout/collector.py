"""One phase of play over all of Fabric's ranks. Knows no Trainer: ``fit`` and ``play`` use the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch.distributed
from lightning.fabric import Fabric

from lit_stepwise.errors import ConfigError, EngineError
from lit_stepwise.interfaces import Engine, Environment
from lit_stepwise.rollout.agent_loop import AgentLoop, Attempt, mix_seed
from lit_stepwise.rollout.rendering import ChatRenderer
from lit_stepwise.rollout.turnstile import Turnstile
from lit_stepwise.types import Deadlines, Limits, Prepared, Rollout, Sampling, Task, Trajectory, Turn

_STAGE_SEEDS = {"train": 0, "evaluate": 1}
"""Keeps the draws of training and evaluation apart."""

_PATIENCE = timedelta(days=1)  # a rank waits for those that still play; one that died is noticed at once

T = TypeVar("T")


@dataclass(slots=True)
class Collector:
    """Plays tasks on every rank of ``fabric`` and tells its callbacks.

    Hooks, called on every callback (and the LightningModule) that has a method of that name:
    ``on_rollout_start(stage, iteration, num_trajectories)``, ``on_engine_step(num_generating, num_executing)``,
    ``on_turn_end(turn, task_id)`` and ``on_trajectory_end(trajectory)``, each about this rank's play and by the thread
    that plays.
    """

    fabric: Fabric
    engine: Engine
    environment: Environment
    renderer: ChatRenderer
    limits: Limits
    deadlines: Deadlines
    deterministic: bool
    num_threads: int
    seed: int
    turnstile: Turnstile = field(default_factory=Turnstile)
    on_progress: Callable[[], None] = lambda: None
    """Called whenever a turn ended."""
    group: Any = None
    """Process group of its own, for play may run beside training; None while there is one process."""
    prompt_tokens: dict[int, int] = field(default_factory=dict)
    """Lengths of the first prompts of the tasks that were chosen, by their ``id``."""

    def __post_init__(self) -> None:
        if self.fabric.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def play(
        self,
        tasks: Sequence[Task],
        samplings: Sequence[Sampling],
        *,
        stage: Literal["train", "evaluate"],
        iteration: int,
        first_group: int = 0,
        max_turns: int | None = None,
    ) -> Rollout:
        """One attempt at every task with each of ``samplings``; groups count from ``first_group``.

        ``max_turns`` is that of the limits unless given.

        Every so many tasks one is this rank's, all its attempts together. When the engine fails, what was unfinished
        has failed, and ``Rollout.engine_failure`` says why.
        """
        began = time.perf_counter()
        replica = Replica.of(self.fabric, self.engine)
        seed = (self.seed, _STAGE_SEEDS[stage], max(iteration, 0))
        mine = list(enumerate(tasks, start=first_group))[replica.index :: replica.count] if replica.leads else []
        attempts = [
            Attempt(task, group, sample, seed, sampling)
            for group, task in mine
            for sample, sampling in enumerate(samplings)
        ]
        limits = self.limits if max_turns is None else replace(self.limits, max_turns=max_turns)
        loop, stats, failure = self._loop(limits), self.environment.stats(), ""
        self.fabric.call("on_rollout_start", stage=stage, iteration=iteration, num_trajectories=len(attempts))
        try:
            self.engine.begin_phase(mix_seed(*seed, replica.index, *([first_group] if first_group else [])))
            if replica.leads:
                loop.play(attempts)
            else:
                self.engine.follow()
        except EngineError as error:
            failure = str(error)
            loop.give_up(attempts, "the engine failed")
        finally:
            self.engine.end_phase()
        trajectories = [attempt.trajectory() for attempt in attempts]
        return Rollout(
            stage=stage,
            iteration=iteration,
            policy_version=self.engine.policy_version,
            trajectories=trajectories,
            engine_seconds=loop.engine_seconds if replica.leads else None,
            environment_seconds=sum(turn.environment_seconds for each in trajectories for turn in each.turns),
            play_seconds=time.perf_counter() - began,
            num_cached_tokens=loop.num_cached_tokens,
            environment_stats={name: value - stats[name] for name, value in self.environment.stats().items()},
            engine_failure=failure,
        )

    def choose(self, tasks: Sequence[Task]) -> Prepared:
        """Those of ``tasks`` that can be played and whose first prompt is within its budget; equal on every rank.

        Raises ``DataError`` or ``ConfigError`` when there is none.
        """
        prepared = self.environment.prepare(tasks)
        lengths = [len(self.first_prompt(task)) for task in prepared.tasks]
        limit = self.limits.max_prompt_tokens
        kept = {id(task): length for task, length in zip(prepared.tasks, lengths, strict=True) if length <= limit}
        reports = [prepared.report] if prepared.report else []
        if len(kept) < len(lengths):
            longest = max(lengths)
            name = prepared.tasks[lengths.index(longest)].task_id
            over = (
                f"rollout.limits.max_prompt_tokens={limit}, but the first prompts of {len(lengths) - len(kept)} of "
                f"{len(lengths)} tasks are longer, the longest ({name}) with {longest} tokens"
            )
            if not kept:
                raise ConfigError(f"{over}; raise it to {longest} (and max_context_tokens with it)")
            reports.append(f"{over}; they are left out")
        # what a rank finds may hang on how busy its machine is (a gold statement that runs out of time)
        found = [(index, kept[id(task)]) for index, task in enumerate(tasks) if id(task) in kept]
        chosen = self.fabric.broadcast(found)
        self.prompt_tokens = {id(tasks[i]): length for i, length in chosen}
        return Prepared([tasks[i] for i, _ in chosen], "\n".join(reports))

    def check_machines(self) -> None:
        """Raises ``ConfigError`` where ranks on several machines would share an engine that cannot span them."""
        refuse_far_engines(self.engine, self.from_all_ranks(self.fabric.node_rank))

    def first_prompt(self, task: Task) -> list[int]:
        """Its tokens."""
        return self.renderer.first_prompt(self.environment.start(task, self.limits.max_turns).prompt())

    def gather(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The trajectories of all ranks, ordered by group and sample; equal on every rank."""
        every = (each for part in self.from_all_ranks(trajectories) for each in part)
        return sorted(every, key=lambda each: (each.group, each.sample))

    def from_all_ranks(self, value: T) -> list[T]:
        """What each rank gave, equal on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def _loop(self, limits: Limits) -> AgentLoop:
        def turn_ended(turn: Turn, task_id: str) -> None:
            self.on_progress()
            self.fabric.call("on_turn_end", turn=turn, task_id=task_id)

        def trajectory_ended(attempt: Attempt) -> None:
            self.fabric.call("on_trajectory_end", trajectory=attempt.trajectory())

        def engine_stepped(num_generating: int, num_executing: int) -> None:
            self.fabric.call("on_engine_step", num_generating=num_generating, num_executing=num_executing)

        return AgentLoop(
            engine=self.engine,
            environment=self.environment,
            renderer=self.renderer,
            limits=limits,
            deadlines=self.deadlines,
            deterministic=self.deterministic,
            num_threads=self.num_threads,
            turnstile=self.turnstile,
            on_engine_step=engine_stepped,
            on_turn_end=turn_ended,
            on_trajectory_end=trajectory_ended,
        )


def refuse_far_engines(engine: Engine, machines: Sequence[int]) -> None:
    """Raises ``ConfigError`` for an engine that ranks on several machines would share, and that cannot span them.

    ``machines`` has the number of each rank's machine.
    """
    size = engine.tensor_parallel_size
    for first in range(0, len(machines), size):
        spanned = sorted(set(machines[first : first + size]))
        if len(spanned) > 1:
            per_machine = min(map(machines.count, machines))
            fitting = ", ".join(str(number) for number in range(1, per_machine + 1) if per_machine % number == 0)
            raise ConfigError(
                f"rollout.engine.tensor_parallel_size={size} would let the engine of ranks {first} to "
                f"{first + size - 1} span the machines {spanned[0]} and {spanned[1]}, which share no memory; use one "
                f"of {fitting}"
            )
    if engine.on_one_machine and len(set(machines)) > 1:
        raise ConfigError(
            f"rollout.engine={type(engine).__name__} without urls starts servers that the other "
            f"{len(set(machines)) - 1} of the {len(set(machines))} machines cannot reach; start them with "
            "`lit-stepwise serve --host 0.0.0.0`, and name them in rollout.engine.urls"
        )


@dataclass(frozen=True, slots=True)
class Replica:
    """Which of the engines this rank belongs to."""

    index: int
    count: int
    leads: bool
    """Only the first rank of an engine plays."""

    @classmethod
    def of(cls, fabric: Fabric, engine: Engine) -> Replica:
        """Neighbouring ranks share an engine. Raises ``ConfigError`` when that does not come out even."""
        size, rank, world = engine.tensor_parallel_size, fabric.global_rank, fabric.world_size
        if world % size:
            fitting = ", ".join(str(number) for number in range(1, world + 1) if world % number == 0)
            raise ConfigError(
                f"rollout.engine.tensor_parallel_size={size} does not divide the {world} ranks of the trainer; use one "
                f"of {fitting}, or change trainer.devices"
            )
        return cls(rank // size, world // size, rank % size == 0)
