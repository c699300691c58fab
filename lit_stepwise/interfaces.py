"""What a plug-in must offer. Each class here can be named in YAML by ``class_path`` and replaced by one of your own."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from lit_stepwise.types import (
    Adapter,
    Completion,
    Feedback,
    LossOutput,
    Message,
    Prepared,
    QueryResult,
    Request,
    Rollout,
    SpanReward,
    SQLTurn,
    StepSample,
    Task,
    Trajectory,
    Turn,
)

if TYPE_CHECKING:
    from torch import Tensor


class TaskSource(ABC):
    """Where tasks come from. Built once from the YAML."""

    def prepare(self) -> None:
        """Make what has to exist on disk; called once per machine before anything is read (``prepare_data``)."""

    @abstractmethod
    def read(self, file: str) -> list[Task]:
        """All tasks of ``file``, in order. Raises ``DataError`` with file and line for what cannot be read."""


class Episode(ABC):
    """One attempt at one task, in play."""

    @abstractmethod
    def prompt(self) -> Sequence[Message]:
        """The conversation before the model's first turn."""

    @abstractmethod
    def step(self, response: str) -> Feedback:
        """Answer one response. Called from a thread of its own; never called again after ``done``.

        What the model did wrong is feedback, not an exception. An exception here fails this trajectory alone.
        """

    def cut_short(self) -> Mapping[str, float] | None:
        """Reward components to stand in place of the last turn's, when the context has no room for another turn.

        Running out of context must not pay better than running out of turns. None keeps what the turn was given.
        """
        return None


class Environment(ABC):
    """A kind of task. Built once from the YAML; holds settings and shared resources, never a game in play."""

    stop: Sequence[str] = ()
    """Strings that end a response, besides the end-of-turn token: where an action of the protocol closes."""
    offers_state_keys: ClassVar[bool] = False
    """True: every ``Feedback`` that leaves the episode open carries a ``state_key``."""

    @abstractmethod
    def start(self, task: Task, max_turns: int) -> Episode:
        """Begin a fresh attempt that may take ``max_turns`` turns."""

    def prepare(self, tasks: Sequence[Task]) -> Prepared:
        """Check and warm up what these tasks need, and say which of them can be played. Raises ``DataError``."""
        return Prepared(tasks)

    def stats(self) -> Mapping[str, float]:
        """What shared resources did since they were made, by name; only ever grows. Logged as ``environment/<name>``.

        The names are the same on every rank and from the first call on.
        """
        return {}

    def close(self) -> None:
        """Give shared resources back."""


class Executor(ABC):
    """Runs untrusted SQL against one kind of database. Thread-safe."""

    @abstractmethod
    def execute(self, database: Path, sql: str) -> QueryResult:
        """Run one statement read-only. Whatever the statement is, the answer is a result and never an exception."""

    async def aexecute(self, database: Path, sql: str) -> QueryResult:
        """The same for an event loop, which goes on meanwhile."""
        return await asyncio.to_thread(self.execute, database, sql)

    def stats(self) -> Mapping[str, float]:
        """What it did since it was made, by name; only ever grows. The names are the same from the first call on."""
        return {}

    def close(self) -> None:
        """End the workers. Idempotent."""


class Reward(ABC):
    """One component of what a turn of text-to-SQL earned. Pure; the sum of the components is the turn's reward."""

    @abstractmethod
    def __call__(self, turn: SQLTurn) -> float:
        """0 where the component has nothing to say."""

    def spans(self, turn: SQLTurn) -> Sequence[SpanReward]:
        """Rewards for parts of the response, where they stand, on top of what the turn earns."""
        return ()


class Engine(ABC):
    """Samples responses, many at a time. Built from YAML with settings only; ``start`` makes it live.

    Used as: ``start`` once; then per phase of play ``load_weights`` or ``load_adapter`` (when they changed),
    ``begin_phase``, ``submit``/``step``/``abort`` until nothing is pending, ``end_phase``. Never by two threads at a
    time, but not always by the same one.

    Whatever keeps it from answering is an ``EngineError``. It has to be closed then, and may be started again.
    """

    tensor_parallel_size: int = 1
    """Ranks that one engine spans. The first of them leads and plays; the others ``follow`` it."""
    takes_adapters: bool = False
    """Whether ``load_adapter`` works; else an adapter comes merged into the weights."""
    on_one_machine: bool = False
    """Whether it can be reached from the machine of the first rank alone."""

    @abstractmethod
    def start(self, model_path: str, max_context_tokens: int, adapter_rank: int = 0) -> None:
        """Load the Hugging Face model at ``model_path``. Raises ``EngineError`` when it cannot run here.

        Leaves the global state of torch (generators, threads, environment variables) as it was. ``adapter_rank`` is
        that of the adapters to come; 0: none will.
        """

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Take new weights by Hugging Face name, one tensor at a time, and wake up if it was asleep.

        Nothing that older weights computed is used any more: requests that are pending go on from the tokens they
        have, computed anew. Ranks call it together.
        """

    def load_adapter(self, adapter: Adapter, policy_version: int) -> None:
        """The same for an adapter on weights that were loaded; only with ``takes_adapters``."""
        raise NotImplementedError

    @abstractmethod
    def begin_phase(self, seed: int) -> None:
        """Start a phase of play whose random choices follow ``seed`` alone: nothing cached, nothing pending."""

    def end_phase(self) -> None:
        """The phase is over, be it by an error: give up what is pending, and let those go who ``follow``."""

    def follow(self) -> None:
        """On a rank that does not lead, after ``begin_phase``: do as the leader does until its ``end_phase``."""

    @abstractmethod
    def submit(self, request: Request) -> None:
        """Queue one request."""

    @abstractmethod
    def step(self) -> list[Completion]:
        """Advance all requests by at least one token, or wait a few milliseconds for others to do so.

        Returns those that finished, in a reproducible order if the engine is in this process.
        """

    @abstractmethod
    def abort(self, request_ids: Sequence[str]) -> None:
        """Give these requests up; nothing comes of them any more. One that is not pending is passed over."""

    def sleep(self) -> None:
        """Lend the accelerator's memory to the trainer, where that is worth it; nothing is pending.

        What was lent is gone: ``policy_version`` is -1 then, and ``load_weights`` wakes it.
        """

    @property
    @abstractmethod
    def num_pending(self) -> int:
        """Requests submitted and not finished."""

    @property
    @abstractmethod
    def policy_version(self) -> int:
        """``global_step`` of the weights it samples from; -1 when it has none, as before the first ``load_weights``."""

    @property
    @abstractmethod
    def description(self) -> str:
        """One line for people: what runs, and why this one."""

    @abstractmethod
    def close(self) -> None:
        """Give memory and processes back. Idempotent; works on an engine that died or never started."""


class Advantage(ABC):
    """Credit: how much better a turn was than its group."""

    needs_state_keys: ClassVar[bool] = False
    """True: it compares turns that begin in equal states, and needs an environment that ``offers_state_keys``."""

    @abstractmethod
    def __call__(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        """An advantage for every turn of every trajectory, in the order given. Failed trajectories are not passed in.

        The trajectories of one group stand anywhere in the list; ``Trajectory.group`` says which belong together.
        """


class PolicyLoss(ABC):
    """The objective, per response token."""

    @abstractmethod
    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, turns: Tensor
    ) -> LossOutput:
        """All arguments are [N]; ``logprobs`` carry the gradient, ``mask`` is True on tokens that count.

        ``turns`` is int64: which row of the micro-batch a token belongs to, for objectives over whole turns. A turn is
        never split between calls. What stands where ``mask`` is False, infinities too, must leave no gradient.
        """


class Player(Protocol):
    """What the ``RolloutCallback`` offers to the data module: trajectories on demand."""

    def collect(self, iteration: int) -> list[StepSample]:
        """Play the tasks of ``iteration`` with exploration on all ranks; the step samples of all, equal on each."""

    def evaluate(self, tasks: Sequence[Task]) -> Rollout:
        """Play ``tasks`` as ``rollout.evaluation`` says; what this rank played."""


class Policy(Protocol):
    """What the Lightning module offers to the ``RolloutCallback``."""

    model_path: str
    adapter_rank: int
    """Of the adapter that is trained; 0: the weights themselves are."""
    staleness: int
    """Set by the callback before anything is trained: iterations that play may run ahead of training."""

    def weights(self, merged: bool = True) -> Iterable[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor), lazily and in the same order on every rank.

        ``merged``: with the adapter in them, where there is one; else those it stands on.
        """

    def adapter(self) -> Adapter:
        """The adapter; only where ``adapter_rank`` is not 0. Every rank calls it together."""

    def score(self, said: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[Tensor, Tensor]]:
        """Of each (prompt, response): [R] its log-probabilities at temperature 1, [R] those of the likeliest tokens.

        Without gradient, in one forward pass. Every rank calls it together.
        """

    def logprob_gap(self) -> float:
        """Mean absolute difference of engine and trainer, in nats, on the tokens of the optimizer step that is due.

        Every rank calls it together, between the backward passes and the step.
        """

    def learnt_logprobs(self, samples: Sequence[StepSample]) -> dict[int, list[float]]:
        """Of the last optimizer step: what the policy gave the sampled tokens of its samples before it was updated.

        By index into ``samples``, those of its mini-batch; each rank says it of the samples that it forwarded.
        """

    def reference_penalties(self, turns: Sequence[Turn], temperature: float) -> list[float] | None:
        """What leaving the reference costs each of this rank's turns, to be taken from its reward; None: nothing does.

        Every rank calls it together, be it without a turn.
        """


class TaskData(Protocol):
    """What the data module offers to the ``RolloutCallback``."""

    player: Player | None

    @property
    def tasks(self) -> Sequence[Task]:
        """Every task that the running stage may play."""

    def keep(self, tasks: Sequence[Task]) -> None:
        """Play these from now on, and none of the others."""

    @property
    def training_tasks(self) -> Sequence[Task]:
        """Every task that training may play."""

    def tasks_for(self, iteration: int, weights: Sequence[float]) -> Sequence[Task]:
        """Those of ``iteration``, by the ``weights`` of all training tasks (see ``Deal``)."""

    def further_tasks(self, iteration: int, weights: Sequence[float]) -> Iterator[Task]:
        """Tasks to play besides, where filters leave groups out."""

    @property
    def iteration(self) -> int:
        """The one being trained, from 0."""

    def ensure_iteration(self) -> None:
        """Collect a new iteration when the last one is used up."""

    def advance(self) -> None:
        """One mini-batch was trained."""
