"""One phase of play over all of Fabric's ranks. Knows no Trainer: ``fit`` and ``play`` use the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed
from lightning.fabric import Fabric

from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import Engine, Environment
from lit_stepwise.rollout.agent_loop import AgentLoop, Attempt, mix_seed
from lit_stepwise.rollout.rendering import ChatRenderer
from lit_stepwise.types import Limits, Rollout, Sampling, Task, Trajectory, Turn

_STAGE_SEEDS = {"train": 0, "evaluate": 1}
"""Keeps the draws of training and evaluation apart."""


@dataclass(slots=True)
class Collector:
    """Plays tasks on every rank of ``fabric`` and tells its callbacks.

    Hooks, called on every callback (and the LightningModule) that has a method of that name:
    ``on_rollout_start(stage, iteration, num_trajectories)``, ``on_turn_end(turn, task_id)``,
    ``on_trajectory_end(trajectory)`` and ``on_rollout_end(rollout)``, each about this rank's play.
    """

    fabric: Fabric
    engine: Engine
    environment: Environment
    renderer: ChatRenderer
    limits: Limits
    deterministic: bool
    num_threads: int
    seed: int

    def play(
        self,
        tasks: Sequence[Task],
        samples_per_task: int,
        sampling: Sampling,
        *,
        stage: Literal["train", "evaluate"],
        iteration: int,
        sync_seconds: float = 0.0,
    ) -> Rollout:
        """Every ``world_size``-th task is this rank's, all its samples together."""
        began = time.perf_counter()
        seed = (self.seed, _STAGE_SEEDS[stage], max(iteration, 0))
        attempts = [
            Attempt(task, group, sample, seed)
            for group, task in list(enumerate(tasks))[self.fabric.global_rank :: self.fabric.world_size]
            for sample in range(samples_per_task)
        ]
        loop = self._loop(sampling)
        self.fabric.call("on_rollout_start", stage=stage, iteration=iteration, num_trajectories=len(attempts))
        self.engine.begin_phase(mix_seed(*seed, self.fabric.global_rank))
        loop.play(attempts)
        trajectories = [attempt.trajectory(sampling.temperature) for attempt in attempts]
        rollout = Rollout(
            stage=stage,
            iteration=iteration,
            policy_version=self.engine.policy_version,
            trajectories=trajectories,
            engine_seconds=loop.engine_seconds,
            environment_seconds=sum(turn.environment_seconds for each in trajectories for turn in each.turns),
            sync_seconds=sync_seconds,
            play_seconds=time.perf_counter() - began,
            num_cached_tokens=loop.num_cached_tokens,
        )
        self.fabric.call("on_rollout_end", rollout=rollout)
        return rollout

    def check_prompts(self, tasks: Sequence[Task]) -> list[int]:
        """Render every first prompt; the shortest, for probes. Raises ``ConfigError`` when one is over its budget."""
        shortest: list[int] = []
        longest, name, num_over = 0, "", 0
        for task in tasks:
            ids = self.renderer.first_prompt(self.environment.start(task, self.limits.max_turns).prompt())
            shortest = ids if not shortest or len(ids) < len(shortest) else shortest
            num_over += len(ids) > self.limits.max_prompt_tokens
            if len(ids) > longest:
                longest, name = len(ids), task.task_id
        if num_over:
            raise ConfigError(
                f"rollout.limits.max_prompt_tokens={self.limits.max_prompt_tokens}, but the first prompts of "
                f"{num_over} of {len(tasks)} tasks are longer, the longest ({name}) with {longest} tokens; raise it to "
                f"{longest} (and max_context_tokens with it), or take those tasks out of the file"
            )
        return shortest

    def gather(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The trajectories of all ranks, ordered by group and sample; equal on every rank."""
        parts: list[Any] = [trajectories]
        if self.fabric.world_size > 1:
            parts = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(parts, list(trajectories))
        return sorted((each for part in parts for each in part), key=lambda each: (each.group, each.sample))

    def _loop(self, sampling: Sampling) -> AgentLoop:
        def turn_ended(turn: Turn, task_id: str) -> None:
            self.fabric.call("on_turn_end", turn=turn, task_id=task_id)

        def trajectory_ended(attempt: Attempt) -> None:
            self.fabric.call("on_trajectory_end", trajectory=attempt.trajectory(sampling.temperature))

        return AgentLoop(
            engine=self.engine,
            environment=self.environment,
            renderer=self.renderer,
            limits=self.limits,
            sampling=sampling,
            deterministic=self.deterministic,
            num_threads=self.num_threads,
            on_turn_end=turn_ended,
            on_trajectory_end=trajectory_ended,
        )
