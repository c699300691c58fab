"""What plays, with or without a Trainer: it owns engine and environment, and gives trajectories to whoever asks."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from lightning.fabric import Fabric
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_stepwise.algo.filters import Filters
from lit_stepwise.errors import ConfigError, StepwiseError
from lit_stepwise.interfaces import Advantage, Engine, Environment, Policy
from lit_stepwise.rollout.collector import Collector, Replica
from lit_stepwise.rollout.heartbeat import Heartbeat
from lit_stepwise.rollout.phases import Draw, Phases, Played
from lit_stepwise.rollout.rendering import ChatRenderer, History
from lit_stepwise.rollout.samples import Rows, assign_credit, step_samples, with_component
from lit_stepwise.rollout.wiring import load_tokenizer
from lit_stepwise.store.settings import Storage
from lit_stepwise.store.write import StoredPhase, TrajectoryStore
from lit_stepwise.types import (
    Deadlines,
    Evaluation,
    Limits,
    Rollout,
    Sampling,
    StepSample,
    Task,
    Trajectory,
)

_NUM_PROBES = 3
_PROBE_TOKENS = 128


class TaskPlayer:
    """Plays the tasks of an iteration, and those of an evaluation, for whoever asks.

    Args:
        engine: samples the responses.
        environment: the kind of task.
        advantage: turns the rewards of a group into credit for each turn.
        samples_per_task: attempts at each task in an iteration; their mean is the baseline.
        samples: what a training row is: ``step`` (a turn) or ``trajectory`` (all turns of an attempt, as in standard
            multi-turn training). It is what reductions by step and objectives over sequences work on.
        filters: what is left out between play and training, and what length costs.
        sampling: how training play draws tokens.
        evaluation: how validation, test and prediction play.
        limits: token budgets and turns.
        history: what the model reads of earlier turns. append: the very ids it read and sampled. keep_think and
            strip_think: the chat template's view of the conversation, with all of each response, or without its
            thought.
        deadlines: how long things may take.
        staleness: iterations that play may run ahead of training; 0 takes turns. More needs an engine with a device of
            its own to be worth it.
        deterministic: hand turns to and fro in a fixed order, so that a resumed run plays what it would have played.
            False takes whoever is ready first.
        num_environment_threads: environment steps that may run at a time.
        max_logprob_gap: engine and trainer may differ by this many nats in the mean, after each weight sync and in the
            first optimizer step; beyond it the run stops.
        max_engine_restarts: times that an engine that died is started again; trajectories it was busy with have failed.
        store: what of every turn is kept in the run's ``trajectories/``, and how much of it.
        seed: of all play; on the command line it follows ``seed_everything``.
    """

    def __init__(
        self,
        engine: Engine,
        environment: Environment,
        advantage: Advantage,
        samples_per_task: int = 8,
        samples: Rows = "step",
        filters: Filters = Filters(),  # noqa: B008  (frozen; jsonargparse shows it as the default)
        sampling: Sampling = Sampling(),  # noqa: B008
        evaluation: Evaluation = Evaluation(),  # noqa: B008
        limits: Limits = Limits(),  # noqa: B008
        history: History = "append",
        deadlines: Deadlines = Deadlines(),  # noqa: B008
        staleness: int = 0,
        deterministic: bool = False,
        num_environment_threads: int = 8,
        max_logprob_gap: float = 0.1,
        max_engine_restarts: int = 0,
        store: Storage = Storage(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        if samples_per_task < 2:
            raise ConfigError(
                f"rollout.samples_per_task={samples_per_task} gives every group one trajectory and nothing to compare "
                "it with; use 2 or more"
            )
        if num_environment_threads < 1:
            raise ConfigError(f"rollout.num_environment_threads={num_environment_threads}; use 1 or more")
        for name, value in {"staleness": staleness, "max_engine_restarts": max_engine_restarts}.items():
            if value < 0:
                raise ConfigError(f"rollout.{name}={value} is negative; use 0 for none")
        if advantage.needs_state_keys and not environment.offers_state_keys:
            raise ConfigError(
                f"rollout.advantage={type(advantage).__name__} compares turns that begin in equal states, but "
                f"rollout.environment={type(environment).__name__} offers no state keys; use e.g. TurnReturn, or an "
                "environment that offers them"
            )
        if sampling.temperature == 0:
            raise ConfigError("rollout.sampling.temperature=0 never explores; use e.g. 1.0")
        if staleness and deterministic:
            raise ConfigError(
                f"rollout.staleness={staleness} lets weights arrive while turns are played, so that what is played "
                "hangs on time; use deterministic: false, or staleness: 0"
            )
        if staleness and engine.tensor_parallel_size > 1:
            raise ConfigError(
                f"rollout.staleness={staleness} cannot play beside training on an engine that spans "
                f"rollout.engine.tensor_parallel_size={engine.tensor_parallel_size} ranks of the trainer; use "
                "VLLMServerEngine, or staleness: 0"
            )
        self.engine = engine
        self.environment = environment
        self.advantage = advantage
        self.samples_per_task = samples_per_task
        self.samples: Rows = samples
        filters.check(limits.max_new_tokens)
        self.filters = filters
        self.sampling = sampling
        self.evaluation = evaluation
        self.limits = limits
        self.history: History = history
        self.deadlines = deadlines
        self.staleness = staleness
        self.deterministic = deterministic
        self.num_environment_threads = num_environment_threads
        self.max_logprob_gap = max_logprob_gap
        self.max_engine_restarts = max_engine_restarts
        self.store = store
        self.seed = seed
        self._live: _Live | None = None

    def attach(
        self,
        fabric: Fabric,
        policy: Policy,
        tasks: Sequence[Task],
        folder: Path,
        policy_version: Callable[[], int] = lambda: 0,
        draw: Callable[[int], Draw] = lambda iteration: Draw((), iter(())),
        wanted: Callable[[int], bool] = lambda iteration: True,
    ) -> Sequence[Task]:
        """Make ready to play on ``fabric``'s ranks with ``policy``'s weights, and say which of ``tasks`` can be played.

        Args:
            fabric: launched; its callbacks get the rollout hooks.
            policy: gives the weights whenever ``policy_version`` has changed.
            tasks: all that may be played; each is checked now, and what is left out is reported. Raises
                ``ConfigError`` or ``DataError`` when there is none left.
            folder: for the stored trajectories.
            policy_version: ``global_step`` at the time of asking.
            draw: what an iteration plays.
            wanted: whether an iteration will be trained, so that play need not run ahead in vain.
        """
        if self.sampling.top_p < 1:
            rank_zero_warn(
                f"rollout.sampling.top_p={self.sampling.top_p} samples from a cut distribution: the engine's logprobs "
                f"are up to {-math.log(self.sampling.top_p):.3f} nats above those of the whole one, which the "
                "trainer's ratios are of; use 1.0 unless that bias is meant"
            )
        Replica.of(fabric, self.engine)  # raises for ranks that do not come out even
        renderer = ChatRenderer.of(load_tokenizer(policy.model_path), self.history)
        heartbeat = Heartbeat(self.deadlines.heartbeat_seconds)
        collector = Collector(
            fabric=fabric,
            engine=self.engine,
            environment=self.environment,
            renderer=renderer,
            limits=self.limits,
            deadlines=self.deadlines,
            deterministic=self.deterministic,
            num_threads=self.num_environment_threads,
            seed=self.seed,
            on_progress=lambda: heartbeat.beat("playing"),
        )
        collector.check_machines()
        prepared = collector.choose(tasks)
        for report in filter(None, (prepared.report, renderer.difference)):
            rank_zero_info(report)
        # the ends differ, where beginnings are the same system prompt, and short ones are cheap
        prompts = [collector.first_prompt(task)[-_PROBE_TOKENS:] for task in prepared.tasks[:_NUM_PROBES]]
        phases = Phases(
            collector=collector,
            policy=policy,
            policy_version=policy_version,
            draw=draw,
            wanted=wanted,
            prompts=prompts,
            samplings=[self.sampling] * self.samples_per_task,
            filters=self.filters,
            staleness=self.staleness,
            max_logprob_gap=self.max_logprob_gap,
            max_engine_restarts=self.max_engine_restarts,
            heartbeat=heartbeat,
        )
        store = TrajectoryStore(folder, self.store, renderer.tokenizer.decode)
        self._live = _Live(phases, collector, policy, store, heartbeat)
        return prepared.tasks

    def collect(self, iteration: int) -> list[StepSample]:
        """The step samples of ``iteration`` on all ranks, ``samples_per_task`` attempts at each of its tasks.

        Where ``filters`` leave groups out by their outcome, as many further tasks are played in their place.
        """
        began = time.perf_counter()
        played = self.live.phases.take(iteration)
        self._hand_over(played.rollout, began)
        _report_failures(played.trajectories, iteration)
        trajectories = self.filters.with_penalties(self._priced(played), self.limits.max_new_tokens)
        advantages = assign_credit(trajectories, self.advantage)
        selection = self.filters.selection(trajectories, advantages, played.groups, played.num_rounds)
        version = played.rollout.policy_version
        self._keep(StoredPhase("train", version, trajectories, iteration, advantages, selection.left_out))
        self.live.collector.fabric.call(
            "on_selection", iteration=iteration, trajectories=trajectories, advantages=advantages, selection=selection
        )
        self.live.phases.rest()
        return step_samples(trajectories, advantages, self.samples, selection.trained)

    def _hand_over(self, rollout: Rollout, began: float) -> None:
        collector, before = self.live.collector, self.live.handed_over
        now = self.live.handed_over = HandOver(time.perf_counter(), collector.turnstile.seconds_played())
        rollout = replace(rollout, wait_seconds=now.at - began)
        if before is not None:
            leads = Replica.of(collector.fabric, self.engine).leads
            busy = now.seconds_played - before.seconds_played if leads else None
            rollout = replace(rollout, cycle_seconds=now.at - before.at, busy_seconds=busy)
        collector.fabric.call("on_rollout_end", rollout=rollout)
        self._turn_to("prepare")

    def _turn_to(self, phase: str) -> None:
        if self._live is not None:
            self._live.phases.turn_to(phase)

    def evaluate(self, tasks: Sequence[Task]) -> Rollout:
        """Play ``tasks`` as ``evaluation`` says; what this rank played."""
        rollout, trajectories = self._evaluate(tasks)
        self._keep(StoredPhase("evaluate", rollout.policy_version, trajectories))
        return rollout

    def play(self, tasks: Sequence[Task], samples_per_task: int) -> list[Trajectory]:
        """Play ``tasks`` and store all ranks' trajectories: one sample as ``evaluate`` does, more as ``collect``."""
        if samples_per_task == 1:
            rollout, trajectories = self._evaluate(tasks)
            advantages = None
        else:
            rollout, trajectories = self._phase(tasks, [self.sampling] * samples_per_task, "train")
            advantages = assign_credit(trajectories, self.advantage)
        self._keep(StoredPhase("play", rollout.policy_version, trajectories, advantages=advantages))
        return trajectories

    def close(self) -> None:
        """Free the engine and the environment's workers. Idempotent."""
        if self._live is not None:
            live, self._live = self._live, None
            live.phases.close()
            self.environment.close()

    @property
    def live(self) -> _Live:
        """What ``attach`` made. Raises ``StepwiseError`` before it."""
        if self._live is None:
            raise StepwiseError("the RolloutCallback is not attached; use it in a Trainer, or call attach() first")
        return self._live

    def _evaluate(self, tasks: Sequence[Task]) -> tuple[Rollout, list[Trajectory]]:
        return self._phase(tasks, self.evaluation.samplings(self.sampling), "evaluate")

    def _phase(
        self, tasks: Sequence[Task], samplings: Sequence[Sampling], stage: Literal["train", "evaluate"]
    ) -> tuple[Rollout, list[Trajectory]]:
        """What this rank played, and the trajectories of all ranks."""
        live = self.live
        rollout = live.phases.play(tasks, samplings, stage)
        live.collector.fabric.call("on_rollout_end", rollout=rollout)
        return rollout, live.collector.gather(rollout.trajectories)

    def _priced(self, played: Played) -> Sequence[Trajectory]:
        """All ranks' trajectories with the price of leaving the reference among their rewards, where there is one."""
        live, mine = self.live, played.rollout.trajectories
        turns = [turn for trajectory in mine for turn in trajectory.turns]
        penalties = live.policy.reference_penalties(turns, self.sampling.temperature)
        if penalties is None:
            return played.trajectories
        remaining = iter(penalties)
        return live.collector.gather(
            [
                replace(each, turns=[with_component(turn, "kl", -next(remaining)) for turn in each.turns])
                for each in mine
            ]
        )

    def _keep(self, phase: StoredPhase) -> None:
        if self.live.collector.fabric.is_global_zero:
            self.live.store.write(phase)


class HandOver(NamedTuple):
    """An iteration was given to the trainer."""

    at: float
    """``time.perf_counter``."""
    seconds_played: float
    """Of the turnstile, up to then."""


@dataclass(slots=True)
class _Live:
    """What exists only while the callback is attached."""

    phases: Phases
    collector: Collector
    policy: Policy
    store: TrajectoryStore
    heartbeat: Heartbeat
    proven: bool = False
    """The first optimizer step saw that engine and trainer agree."""
    handed_over: HandOver | None = None
    """Of the last iteration."""


def _report_failures(trajectories: Sequence[Trajectory], iteration: int) -> None:
    """Say what failed. Raises ``StepwiseError`` when all did."""
    failures = Counter(each.failure for each in trajectories if each.failed)
    if not failures:
        return
    (reason, number), total = failures.most_common(1)[0], len(trajectories)
    if failures.total() == total:
        raise StepwiseError(
            f"all {total} trajectories of iteration {iteration} failed, {number} of them with '{reason}'; mend that, "
            "then resume with --ckpt_path last"
        )
    rank_zero_warn(
        f"{failures.total()} of {total} trajectories of iteration {iteration} failed and are left out, {number} of "
        f"them with '{reason}'"
    )
