"""Phase after phase of play, on an engine that is kept alive and up to date."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_stepwise.algo.filters import Filters
from lit_stepwise.errors import EngineError, MismatchError
from lit_stepwise.interfaces import Policy
from lit_stepwise.rollout.ahead import Ahead
from lit_stepwise.rollout.collector import Collector
from lit_stepwise.rollout.heartbeat import Heartbeat
from lit_stepwise.rollout.weight_sync import Probe, sync_weights
from lit_stepwise.types import Rollout, Sampling, Task, Trajectory


@dataclass(frozen=True, slots=True)
class Draw:
    """What an iteration plays."""

    tasks: Sequence[Task]
    further: Iterator[Task]
    """To be played besides, where filters leave groups out."""
    max_turns: int | None = None
    """Of each trajectory; None: those of the limits."""


@dataclass(frozen=True, slots=True)
class Played:
    """An iteration as it was played."""

    rollout: Rollout
    """This rank's part, all rounds together."""
    trajectories: list[Trajectory]
    """Of all ranks."""
    groups: set[int]
    """Those that the filters keep."""
    num_rounds: int
    failure: str
    """What ended an engine, on whichever rank; empty when nothing did."""


class Phases:
    """What plays as long as the ``RolloutCallback`` is attached. Every rank calls every method together.

    Args:
        collector: plays one phase.
        policy: gives weights and scores.
        policy_version: ``global_step`` at the time of asking.
        draw: what an iteration plays.
        wanted: whether an iteration will ever be trained.
        prompts: of the run, for the probe after each sync.
        samplings: of the attempts at each task.
        filters: decide what is played again.
        staleness: iterations that play may run ahead of training.
        max_logprob_gap: see ``sync_weights``.
        max_engine_restarts: times that a dead engine is started again.
        heartbeat: hears of every sign of life.
    """

    def __init__(
        self,
        collector: Collector,
        policy: Policy,
        policy_version: Callable[[], int],
        draw: Callable[[int], Draw],
        wanted: Callable[[int], bool],
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        filters: Filters,
        staleness: int,
        max_logprob_gap: float,
        max_engine_restarts: int,
        heartbeat: Heartbeat,
    ) -> None:
        self.collector = collector
        self.policy = policy
        self.policy_version = policy_version
        self.draw = draw
        self.wanted = wanted
        self.prompts = prompts
        self.samplings = samplings
        self.filters = filters
        self.staleness = staleness
        self.max_logprob_gap = max_logprob_gap
        self.max_engine_restarts = max_engine_restarts
        self.heartbeat = heartbeat
        self.engine = collector.engine
        self.started = False
        self.num_restarts = 0
        self.probes: Sequence[Probe] = ()
        # beside training it needs collectives of its own: the order of the trainer's is not that of play
        self.beside = replace(collector, group=None) if staleness else collector
        self.ahead: Ahead[Draw, Played] = Ahead(draw, self._play_beside)

    def take(self, iteration: int) -> Played:
        """The iteration, played now or already; and let the next ones be played meanwhile."""
        while True:
            seconds = self._sync_or_restart()
            self.turn_to("wait" if self.staleness else "play")
            played = self.ahead.take(iteration) if self.staleness else self._play_now(iteration)
            if not played.failure:
                break
            self._bury(played.failure)
            if any(not each.failed for each in played.trajectories):
                break
        if self.staleness:
            self._sync_or_restart()
            for following in range(iteration + 1, iteration + 1 + self.staleness):
                if self.wanted(following):
                    self.ahead.start(following)
        return replace(played, rollout=replace(played.rollout, sync_seconds=seconds))

    def play(
        self, tasks: Sequence[Task], samplings: Sequence[Sampling], stage: Literal["train", "evaluate"]
    ) -> Rollout:
        """A phase that no iteration is made of; this rank's part. Plays it again if the engine dies meanwhile."""
        self.ahead.settle()
        while True:
            seconds = self._sync_or_restart()
            self.turn_to("evaluate" if stage == "evaluate" else "play")
            rollout = self.collector.play(tasks, samplings, stage=stage, iteration=-1 if stage == "evaluate" else 0)
            failure = next(filter(None, self.collector.from_all_ranks(rollout.engine_failure)), "")
            if not failure:
                return replace(rollout, sync_seconds=seconds, wait_seconds=rollout.play_seconds + seconds)
            self._bury(failure)

    def sync(self) -> float:
        """Start the engine if need be, and give it the weights it lacks; the seconds that the latter took."""
        version = self.policy_version()
        lacking = not self.started or self.engine.policy_version != version
        if not any(self.collector.from_all_ranks(lacking)):
            return 0.0
        self.heartbeat.beat("syncing weights")
        with self.collector.turnstile.first():
            if not self.started:
                self.turn_to("start")
                self._start()
            self.turn_to("sync")
            began = time.perf_counter()
            self.probes = sync_weights(
                self.collector, self.policy, version, self.prompts, self.max_logprob_gap, self.probes
            )
        return time.perf_counter() - began

    def turn_to(self, phase: str) -> None:
        """Tell all callbacks what this thread, which is the trainer's, does from here on."""
        self.collector.fabric.call("on_phase", phase=phase)

    def rest(self) -> None:
        """Let the trainer have the engine's memory, unless play goes on beside it."""
        if self.started and not self.staleness:
            self.engine.sleep()

    def close(self) -> None:
        """End play and the engine."""
        self.collector.turnstile.stopped = True
        self.ahead.close(timeout=5.0)
        self.engine.close()
        self.heartbeat.close()

    def _sync_or_restart(self) -> float:
        """``sync``; where no other rank waits for this one meanwhile, on a new engine if the old one fails."""
        while True:
            try:
                return self.sync()
            except MismatchError:
                raise
            except EngineError as error:
                if not self.started or self.collector.fabric.world_size > 1:
                    raise
                self._bury(str(error))

    def _start(self) -> None:
        self.engine.start(
            self.policy.model_path, self.collector.limits.max_context_tokens, adapter_rank=self.policy.adapter_rank
        )
        self.started, self.probes = True, ()
        rank_zero_info(f"engine: {self.engine.description}")

    def _bury(self, failure: str) -> None:
        """Close the engine on all ranks, to be started again. Raises ``EngineError`` when that was done too often."""
        self.ahead.drop()  # what has been played since is lost as well
        self.engine.close()
        self.started = False
        self.num_restarts += 1
        if self.num_restarts > self.max_engine_restarts:
            raise EngineError(
                f"the engine failed, with rollout.max_engine_restarts={self.max_engine_restarts}; resume with "
                f"--ckpt_path last: {failure}"
            )
        rank_zero_warn(
            f"the engine failed and is started again, restart {self.num_restarts} of "
            f"rollout.max_engine_restarts={self.max_engine_restarts}: {failure}"
        )

    def _play_now(self, iteration: int) -> Played:
        return self._fill(iteration, self.draw(iteration), self.collector)

    def _play_beside(self, iteration: int, draw: Draw) -> Played:
        device = self.collector.fabric.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        return self._fill(iteration, draw, self.beside)

    def _fill(self, iteration: int, draw: Draw, collector: Collector) -> Played:
        """All rounds of play, until the filters have groups enough."""
        rollouts: list[Rollout] = []
        trajectories: list[Trajectory] = []
        groups: set[int] = set()
        failures: list[str] = []
        num_played, batch = 0, list(draw.tasks)
        while batch:
            rollout = collector.play(
                batch,
                self.samplings,
                stage="train",
                iteration=iteration,
                first_group=num_played,
                max_turns=draw.max_turns,
            )
            rollouts.append(rollout)
            trajectories += collector.gather(rollout.trajectories)
            failures += filter(None, collector.from_all_ranks(rollout.engine_failure))
            num_played += len(batch)
            groups = self.filters.kept_groups(trajectories)
            missing = self.filters.missing_groups(len(draw.tasks), len(groups), len(rollouts)) if not failures else 0
            batch = list(islice(draw.further, missing))
        failure = failures[0] if failures else ""
        return Played(reduce(joined, rollouts), trajectories, groups, len(rollouts), failure)


def joined(first: Rollout, second: Rollout) -> Rollout:
    """Two rounds of play as one."""
    names = ("engine_seconds", "environment_seconds", "sync_seconds", "play_seconds")  # others are known later
    sums = [name for name in names if getattr(first, name) is not None]
    stats = {
        name: first.environment_stats.get(name, 0.0) + second.environment_stats.get(name, 0.0)
        for name in (first.environment_stats | second.environment_stats)  # type: ignore[operator]
    }
    return replace(
        first,
        **{name: getattr(first, name) + getattr(second, name) for name in sums},
        trajectories=[*first.trajectories, *second.trajectories],
        num_cached_tokens=first.num_cached_tokens + second.num_cached_tokens,
        environment_stats=stats,
        engine_failure=first.engine_failure or second.engine_failure,
    )
