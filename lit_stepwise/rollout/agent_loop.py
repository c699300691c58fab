"""Many attempts at once, each at its own pace: prompt, response, feedback, next prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace

import numpy as np

from lit_stepwise.errors import StepwiseError
from lit_stepwise.interfaces import Engine, Environment, Episode
from lit_stepwise.rollout.rendering import ChatRenderer
from lit_stepwise.rollout.threads import DaemonThreads
from lit_stepwise.rollout.turnstile import Turnstile
from lit_stepwise.types import (
    Completion,
    Deadlines,
    Feedback,
    Limits,
    Message,
    Request,
    Sampling,
    StopReason,
    Task,
    Trajectory,
    Turn,
)

TurnHook = Callable[[Turn, str], None]
"""Called with a finished turn and the ``task_id`` of its trajectory."""

_LOOK_SECONDS = 0.05
"""How often deadlines are looked at while there is nothing else to do."""


def mix_seed(*parts: int) -> int:
    """One 63-bit seed out of several numbers, the same on every machine and in every process."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


class Stopped(StepwiseError):
    """Play was told to end by the turnstile."""


@dataclass(slots=True, eq=False)
class Attempt:
    """One trajectory in play."""

    task: Task
    group: int
    sample: int
    seed: Sequence[int]
    """(seed, iteration) of the phase; with group, sample and turn it fixes every draw."""
    sampling: Sampling = Sampling()  # noqa: RUF009  (frozen)
    turns: list[Turn] = field(default_factory=list)
    episode: Episode | None = None
    messages: Sequence[Message] = ()
    """The conversation before the first turn."""
    prompt_ids: Sequence[int] = ()
    """Of the turn that is due."""
    began: float = 0.0
    """When the attempt began, and when its latest turn did; on the monotonic clock."""
    turn_began: float = 0.0
    stop_reason: StopReason | None = None
    failure: str = ""

    @property
    def name(self) -> str:
        """Of the request that is due; unique within a phase of play."""
        return f"{self.group}-{self.sample}-{len(self.turns)}"

    def turn_seed(self) -> int:
        """A function of (seed, iteration, task, sample, turn)."""
        return mix_seed(*self.seed, self.group, self.sample, len(self.turns))

    def trajectory(self) -> Trajectory:
        """What came of it."""
        assert self.stop_reason is not None, f"attempt {self.name} is still in play"
        return Trajectory(
            task_id=self.task.task_id,
            group=self.group,
            sample=self.sample,
            turns=tuple(self.turns),
            stop_reason=self.stop_reason,
            temperature=self.sampling.temperature,
            failure=self.failure,
        )


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a thread made of a completion."""

    turn: Turn
    next_prompt_ids: Sequence[int]
    """Empty when no turn follows."""


@dataclass(slots=True)
class AgentLoop:
    """Plays attempts to their end on one engine. The environment runs in threads, beside the engine."""

    engine: Engine
    environment: Environment
    renderer: ChatRenderer
    limits: Limits
    deterministic: bool
    """Hand turns to the environment and back in a fixed order, so that equal calls give equal batches."""
    num_threads: int
    deadlines: Deadlines = Deadlines()  # noqa: RUF009  (frozen)
    turnstile: Turnstile = field(default_factory=Turnstile)
    on_engine_step: Callable[[int, int], None] = lambda num_generating, num_executing: None
    """Called after a step of the engine with the requests it has yet to answer and the environment steps in flight."""
    on_turn_end: TurnHook = lambda turn, task_id: None
    on_trajectory_end: Callable[[Attempt], None] = lambda attempt: None
    engine_seconds: float = 0.0
    num_cached_tokens: int = 0
    _waiting: dict[str, Attempt] = field(default_factory=dict)
    """For the engine, by the name of their request."""
    _answering: dict[Future[_Answer], Attempt] = field(default_factory=dict)
    """In the environment."""
    _first_prompts: dict[tuple[Message, ...], list[int]] = field(default_factory=dict)
    _began: float = 0.0
    _looked: float = 0.0

    def play(self, attempts: Sequence[Attempt]) -> None:
        """Play every attempt until it has a ``stop_reason``. A fault in one episode ends that attempt alone.

        Raises ``EngineError`` when the engine fails, with attempts that have none.
        """
        self._began = time.monotonic()
        threads = DaemonThreads(self.num_threads, "environment")
        try:
            ready = [attempt for attempt in attempts if self._start(attempt)]
            while True:
                for attempt in ready:
                    self._ask(attempt)
                if not self._waiting and not self._answering:
                    return
                for completion in self._step():
                    if completion.request_id in self._waiting:  # else it was given up meanwhile
                        attempt = self._waiting.pop(completion.request_id)
                        spent = time.monotonic() - attempt.turn_began
                        self._answering[threads.submit(self._answer, attempt, completion, spent)] = attempt
                self.on_engine_step(len(self._waiting), len(self._answering))
                ready = self._answered(threads)
                self._look_at_clock(threads)
        finally:
            threads.close()

    def give_up(self, attempts: Sequence[Attempt], reason: str) -> None:
        """Let those that are unfinished fail."""
        for attempt in attempts:
            if attempt.stop_reason is None:
                self._end(attempt, StopReason.FAILED, reason)

    # ---- to the engine

    def _start(self, attempt: Attempt) -> bool:
        attempt.began = attempt.turn_began = time.monotonic()
        try:
            attempt.episode = self.environment.start(attempt.task, self.limits.max_turns)
            attempt.messages = tuple(attempt.episode.prompt())
            if attempt.messages not in self._first_prompts:  # the attempts at a task share theirs
                self._first_prompts[attempt.messages] = self.renderer.first_prompt(attempt.messages)
        except Exception as error:  # one episode may fail without the others; counted in rollout/failed
            self._end(attempt, StopReason.FAILED, f"{type(error).__name__}: {error}")
            return False
        attempt.prompt_ids = self._first_prompts[attempt.messages]
        return True

    def _ask(self, attempt: Attempt) -> None:
        """Hand the next prompt to the engine, if the budgets leave room for an answer."""
        room = self.limits.max_context_tokens - len(attempt.prompt_ids)
        if room < 1 or (not attempt.turns and len(attempt.prompt_ids) > self.limits.max_prompt_tokens):
            self._cut_short(attempt)
            return
        request = Request(
            request_id=attempt.name,
            prompt_ids=attempt.prompt_ids,
            max_new_tokens=min(self.limits.max_new_tokens, room),
            sampling=replace(attempt.sampling, stop=(*self.environment.stop, *attempt.sampling.stop)),
            seed=attempt.turn_seed(),
            session=str(attempt.group),
        )
        attempt.turn_began = time.monotonic()
        self._waiting[request.request_id] = attempt
        with self.turnstile:
            self.engine.submit(request)

    def _step(self) -> list[Completion]:
        if self.turnstile.stopped:
            raise Stopped("play was stopped")
        if not self._waiting:
            return []
        with self.turnstile:
            began = time.perf_counter()
            completions = [*self.turnstile.stash, *self.engine.step()]
            self.turnstile.stash.clear()
            self.engine_seconds += time.perf_counter() - began
        self.num_cached_tokens += sum(completion.num_cached_tokens for completion in completions)
        return completions

    # ---- to the environment

    def _answer(self, attempt: Attempt, completion: Completion, spent: float) -> _Answer:
        """Runs in a thread, and adds nothing to the attempt: that may be given up meanwhile."""
        assert attempt.episode is not None
        attempt.turn_began = time.monotonic() - spent  # that it waited for a free thread is not its fault
        began = time.perf_counter()
        text = self.renderer.text(completion.response_ids)
        token_rewards: Sequence[float] = ()
        try:
            feedback = attempt.episode.step(text)
            token_rewards = self.renderer.token_rewards(completion.response_ids, feedback.span_rewards)
        except Exception as error:  # one episode may fail without the others; counted in rollout/failed
            feedback = Feedback(observation="", done=True, failure=f"{type(error).__name__}: {error}")
        turn = Turn(
            prompt_ids=attempt.prompt_ids,
            response_ids=completion.response_ids,
            rollout_logprobs=completion.logprobs,
            versions=completion.versions,
            text=text,
            feedback=feedback,
            finish_reason=completion.finish_reason,
            environment_seconds=time.perf_counter() - began,
            engine_seconds=spent,
            num_cached_tokens=completion.num_cached_tokens,
            token_rewards=token_rewards,
        )
        if feedback.done or feedback.failure or len(attempt.turns) + 1 >= self.limits.max_turns:
            return _Answer(turn, ())
        return _Answer(turn, self.renderer.next_prompt(attempt.messages, [*attempt.turns, turn]))

    def _answered(self, threads: DaemonThreads) -> list[Attempt]:
        """Those that have another turn to play: of all in order when deterministic, otherwise of whoever is ready."""
        if self.deterministic:
            while wait(self._answering, timeout=_LOOK_SECONDS).not_done:
                self._look_at_clock(threads)
                if self.turnstile.stopped:
                    raise Stopped("play was stopped")
        elif not self._waiting:
            wait(self._answering, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
        answers = [future for future in self._answering if future.done()]
        return [attempt for future in answers if self._go_on(attempt := self._answering.pop(future), future.result())]

    def _go_on(self, attempt: Attempt, answer: _Answer) -> bool:
        """Keep the turn; True when the attempt has another one to play."""
        feedback = answer.turn.feedback
        attempt.turns.append(answer.turn)
        self.on_turn_end(answer.turn, attempt.task.task_id)
        if feedback.failure:
            self._end(attempt, StopReason.FAILED, feedback.failure)
        elif feedback.done:
            self._end(attempt, StopReason.DONE)
        elif len(attempt.turns) >= self.limits.max_turns:
            self._end(attempt, StopReason.MAX_TURNS)
        elif reason := self._overdue(attempt, time.monotonic(), turn_runs=False):
            self._end(attempt, StopReason.FAILED, f"{reason}, between two turns")
        else:
            attempt.prompt_ids = answer.next_prompt_ids
            return True
        return False

    # ---- ends

    def _cut_short(self, attempt: Attempt) -> None:
        rewards = attempt.episode.cut_short() if attempt.episode and attempt.turns else None
        if rewards is not None:
            last = attempt.turns[-1]
            attempt.turns[-1] = replace(last, feedback=replace(last.feedback, rewards=rewards))
        self._end(attempt, StopReason.CONTEXT)

    def _look_at_clock(self, threads: DaemonThreads) -> None:
        """Give up whatever is overdue."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        lost = {name: reason for name, each in self._waiting.items() if (reason := self._overdue(each, now, True))}
        if lost:
            with self.turnstile:
                self.engine.abort(list(lost))
        for name, reason in lost.items():
            self._end(self._waiting.pop(name), StopReason.FAILED, f"{reason}, waiting for the engine")
        for future, attempt in list(self._answering.items()):
            if not future.done() and (reason := self._overdue(attempt, now, future.running())):
                threads.give_up(future)
                del self._answering[future]
                self._end(attempt, StopReason.FAILED, f"{reason}, waiting for the environment")

    def _overdue(self, attempt: Attempt, now: float, turn_runs: bool) -> str:
        """Which deadline it has missed; empty when none."""
        for name, began in (
            ("turn_seconds", attempt.turn_began if turn_runs else now),
            ("trajectory_seconds", attempt.began),
            ("phase_seconds", self._began),
        ):
            limit = getattr(self.deadlines, name)
            if limit is not None and now - began > limit:
                return f"rollout.deadlines.{name}={limit:g} ran out"
        return ""

    def _end(self, attempt: Attempt, reason: StopReason, failure: str = "") -> None:
        attempt.stop_reason, attempt.failure = reason, failure
        self.on_trajectory_end(attempt)
