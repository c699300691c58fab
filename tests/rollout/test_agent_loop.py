"""Many attempts at their own pace, on a scripted engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lit_stepwise.errors import EngineError
from lit_stepwise.interfaces import Environment, Episode
from lit_stepwise.rollout.agent_loop import AgentLoop, Attempt, Stopped, mix_seed
from lit_stepwise.rollout.rendering import ChatRenderer
from lit_stepwise.testing import Countdown, CountdownTask, ScriptedEngine
from lit_stepwise.types import Deadlines, Feedback, Limits, Message, Request, Sampling, StopReason, Task, Trajectory


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def renderer(tokenizer: Any) -> ChatRenderer:
    return ChatRenderer.of(tokenizer)


class Speaker:
    """An engine's script: says the texts of an attempt one after the other."""

    def __init__(self, tokenizer: Any, *texts: str) -> None:
        self.tokenizer = tokenizer
        self.texts = texts

    def __call__(self, request: Request) -> Sequence[int]:
        turn = int(request.request_id.split("-")[-1])
        return self.tokenizer(self.texts[turn])["input_ids"]


def loop_of(engine: ScriptedEngine, renderer: ChatRenderer, environment: Environment, **settings: Any) -> AgentLoop:
    limits = Limits(
        **{"max_prompt_tokens": 60, "max_context_tokens": 120, "max_turns": 4, **settings.pop("limits", {})}
    )
    return AgentLoop(
        engine,
        environment,
        renderer,
        limits,
        settings.get("deterministic", True),
        settings.get("num_threads", 4),
        settings.get("deadlines", Deadlines()),
    )


def attempts_at(*goals: int, sampling: Sampling) -> list[Attempt]:
    return [
        Attempt(CountdownTask(task_id=f"goal-{goal}", goal=goal), i, 0, (5, 0, 2), sampling)
        for i, goal in enumerate(goals)
    ]


def play(loop: AgentLoop, *goals: int) -> list[Trajectory]:
    attempts = attempts_at(*goals, sampling=Sampling())
    loop.play(attempts)
    return [attempt.trajectory() for attempt in attempts]


def test_a_trajectory_goes_on_until_the_environment_is_done(tokenizer: Any, renderer: ChatRenderer) -> None:
    engine = ScriptedEngine(Speaker(tokenizer, "12345", "123", "1"))
    (trajectory,) = play(loop_of(engine, renderer, Countdown()), 1)
    assert [turn.text for turn in trajectory.turns] == ["12345", "123", "1"]
    assert [turn.reward for turn in trajectory.turns] == [0.5, 0.5, 1.5]
    assert (trajectory.stop_reason, trajectory.success, trajectory.reward) == (StopReason.DONE, True, 2.5)


def test_the_engine_reads_exactly_what_it_read_and_wrote_before_and_then_the_observation(
    tokenizer: Any, renderer: ChatRenderer
) -> None:
    engine = ScriptedEngine(Speaker(tokenizer, "12345", "1"))
    (trajectory,) = play(loop_of(engine, renderer, Countdown()), 1)
    first, second = trajectory.turns
    assert [list(request.prompt_ids) for request in engine.requests] == [first.prompt_ids, second.prompt_ids]
    spoken = [*first.prompt_ids, *first.response_ids]
    assert second.prompt_ids[: len(spoken)] == spoken
    assert tokenizer.decode(second.prompt_ids[len(spoken) :]) == (
        "<|im_end|>\n<|im_start|>user\n5 is too long<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_engine_stops_where_environment_and_settings_say(tokenizer: Any, renderer: ChatRenderer) -> None:
    engine = ScriptedEngine(Speaker(tokenizer, "1"))
    game = Countdown()
    game.stop = ("</move>",)
    attempts = attempts_at(3, sampling=Sampling(0.25, 0.5, ("!",)))
    loop_of(engine, renderer, game).play(attempts)
    assert [request.sampling for request in engine.requests] == [Sampling(0.25, 0.5, ("</move>", "!"))]
    assert attempts[0].trajectory().temperature == 0.25


def test_turns_and_context_end_a_trajectory_with_their_reason(tokenizer: Any, renderer: ChatRenderer) -> None:
    engine = ScriptedEngine(Speaker(tokenizer, *["123456789"] * 9))
    loop = loop_of(engine, renderer, Countdown(), limits={"max_turns": 2})
    (trajectory,) = play(loop, 3)
    assert (trajectory.stop_reason, len(trajectory.turns)) == (StopReason.MAX_TURNS, 2)
    size = len(engine.requests[0].prompt_ids)
    loop = loop_of(engine, renderer, Countdown(), limits={"max_prompt_tokens": size, "max_context_tokens": size + 12})
    (trajectory,) = play(loop, 3)
    assert (trajectory.stop_reason, len(trajectory.turns)) == (StopReason.CONTEXT, 1)


class Strict(Countdown):
    """Running out of context costs something."""

    def start(self, task: Task, max_turns: int) -> Episode:
        episode = super().start(task, max_turns)
        episode.cut_short = lambda: {"unfinished": -0.75}  # type: ignore[method-assign]
        return episode


def test_the_environment_may_take_back_the_last_reward_when_the_context_is_full(
    tokenizer: Any, renderer: ChatRenderer
) -> None:
    engine = ScriptedEngine(Speaker(tokenizer, *["123456789"] * 9))
    size = len(renderer.first_prompt([Message("user", "count down to 3")]))
    limits = {"max_prompt_tokens": size, "max_context_tokens": size + 55}
    (trajectory,) = play(loop_of(engine, renderer, Strict(), limits=limits), 3)
    assert trajectory.stop_reason is StopReason.CONTEXT
    assert [turn.reward for turn in trajectory.turns] == [0.5, -0.75]


def test_a_response_may_use_no_more_than_what_the_context_leaves(tokenizer: Any, renderer: ChatRenderer) -> None:
    engine = ScriptedEngine(Speaker(tokenizer, "123456789"))
    size = len(renderer.first_prompt([Message("user", "count down to 3")]))
    limits = {"max_prompt_tokens": size, "max_context_tokens": size + 5, "max_new_tokens": 64}
    play(loop_of(engine, renderer, Countdown(), limits=limits), 3)
    assert [request.max_new_tokens for request in engine.requests] == [5]


def test_a_first_prompt_over_its_budget_is_never_sent(tokenizer: Any, renderer: ChatRenderer) -> None:
    engine = ScriptedEngine(Speaker(tokenizer, "1"))
    (trajectory,) = play(loop_of(engine, renderer, Countdown(), limits={"max_prompt_tokens": 5}), 3)
    assert (trajectory.stop_reason, trajectory.turns, engine.requests) == (StopReason.CONTEXT, (), [])


@pytest.mark.parametrize("deterministic", [True, False])
def test_one_crashing_episode_fails_alone_and_says_why(
    tokenizer: Any, renderer: ChatRenderer, deterministic: bool
) -> None:
    def speak(request: Request) -> Sequence[int]:
        group = int(request.request_id.split("-")[0])
        return tokenizer(["boom", "12", "sorry"][group])["input_ids"]

    game = Countdown(crash_on="boom", fail_on="sorry")
    loop = loop_of(ScriptedEngine(speak, batch=2), renderer, game, deterministic=deterministic)
    crashed, fine, failed = play(loop, 2, 2, 2)
    assert (crashed.failed, crashed.failure) == (True, "RuntimeError: crashed on 'boom'")
    assert (failed.failed, failed.failure, failed.reward) == (True, "the game is out of order", 0)
    assert (fine.success, fine.failed) == (True, False)


class Gate(Environment, Episode):
    """The first attempt's answer waits until another attempt has played all its turns."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def start(self, task: Task, max_turns: int) -> Episode:
        episode = Gate()
        episode.opened, episode.name, episode.turns = self.opened, task.task_id, 0  # type: ignore[attr-defined]
        return episode

    def prompt(self) -> Sequence[Message]:
        return [Message("user", "go")]

    def step(self, response: str) -> Feedback:
        self.turns += 1  # type: ignore[attr-defined]
        if self.name == "goal-1":  # type: ignore[attr-defined]
            assert self.opened.wait(60), "the other attempt was held up by this one"
            return Feedback("", done=True)
        if self.turns == 3:  # type: ignore[attr-defined]
            self.opened.set()
        return Feedback("on", done=self.turns == 3)  # type: ignore[attr-defined]


def test_nobody_waits_for_a_slow_environment_unless_asked_to_be_deterministic(
    tokenizer: Any, renderer: ChatRenderer
) -> None:
    engine = ScriptedEngine(Speaker(tokenizer, "a", "b", "c"), batch=2)
    slow, quick = play(loop_of(engine, renderer, Gate(), deterministic=False), 1, 2)
    assert (len(slow.turns), len(quick.turns), slow.failed) == (1, 3, False)


@dataclass
class Sluggish(Countdown):
    """Takes its time over the attempts in ``slow``, by their goals."""

    slow: tuple[int, ...] = ()

    def start(self, task: Task, max_turns: int) -> Episode:
        episode = super().start(task, max_turns)
        if task.goal in self.slow:  # type: ignore[attr-defined]
            answer = episode.step
            episode.step = lambda response: time.sleep(0.05) or answer(response)  # type: ignore[method-assign]
        return episode


THREE_TURNS = {"max_turns": 3, "max_context_tokens": 400}


def orders_of_play(tokenizer: Any, renderer: ChatRenderer, deterministic: bool) -> list[list[tuple[str, int]]]:
    orders = []
    for slow in ((), (1, 2), (3, 4)):
        engine = ScriptedEngine(Speaker(tokenizer, "12345678", "1234567", "123456"), batch=2)
        play(
            loop_of(engine, renderer, Sluggish(slow=slow), deterministic=deterministic, limits=THREE_TURNS), 1, 2, 3, 4
        )
        orders.append([(request.request_id, request.seed) for request in engine.requests])
    return orders


def test_deterministic_play_sends_the_same_requests_in_the_same_order_whoever_is_slow(
    tokenizer: Any, renderer: ChatRenderer
) -> None:
    orders = orders_of_play(tokenizer, renderer, deterministic=True)
    assert orders[0] == orders[1] == orders[2]
    assert len({seed for _, seed in orders[0]}) == len(orders[0]) == 12
    free = orders_of_play(tokenizer, renderer, deterministic=False)
    assert free[1] != free[2]
    assert sorted(free[1]) == sorted(orders[0])  # the seeds do not depend on the order


def test_seeds_depend_on_every_part_and_on_nothing_else() -> None:
    parts = (1, 2, 3)
    assert mix_seed(*parts) == mix_seed(*parts)
    assert len({mix_seed(*parts), mix_seed(2, 2, 3), mix_seed(1, 3, 3), mix_seed(1, 2, 4), mix_seed(1, 2)}) == 5


class Hanging(Countdown):
    """Never answers the attempts at goal 1, until it is released."""

    released: threading.Event

    def start(self, task: Task, max_turns: int) -> Episode:
        episode = super().start(task, max_turns)
        if task.goal == 1:  # type: ignore[attr-defined]
            answer = episode.step
            episode.step = lambda response: answer(response) if self.released.wait(60) else None  # type: ignore[method-assign]
        return episode


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    game = Hanging()
    game.released = threading.Event()
    yield game
    game.released.set()


@pytest.mark.clock
@pytest.mark.parametrize("deterministic", [True, False])
def test_an_environment_that_hangs_fails_its_own_trajectory_and_holds_up_no_other(
    tokenizer: Any, renderer: ChatRenderer, hanging: Hanging, deterministic: bool
) -> None:
    engine = ScriptedEngine(Speaker(tokenizer, "12345", "12"), batch=2)
    loop = loop_of(
        engine,
        renderer,
        hanging,
        deterministic=deterministic,
        deadlines=Deadlines(turn_seconds=0.2),
        num_threads=1,  # and that one hangs
    )
    hung, fine = play(loop, 1, 2)
    assert hung.failure == "rollout.deadlines.turn_seconds=0.2 ran out, waiting for the environment"
    assert (hung.turns, fine.success, [turn.text for turn in fine.turns]) == ((), True, ["12345", "12"])


@pytest.mark.parametrize("name", ["turn_seconds", "trajectory_seconds", "phase_seconds"])
def test_what_the_engine_never_answers_is_given_up_when_a_deadline_runs_out(
    tokenizer: Any, renderer: ChatRenderer, name: str
) -> None:
    engine = ScriptedEngine(Speaker(tokenizer, "1"), batch=0)
    (trajectory,) = play(loop_of(engine, renderer, Countdown(), deadlines=Deadlines(**{name: 0.15})), 3)
    assert trajectory.failure == f"rollout.deadlines.{name}=0.15 ran out, waiting for the engine"
    assert engine.num_pending == 0


@pytest.mark.clock
def test_a_deadline_of_a_turn_begins_anew_with_every_turn_and_that_of_a_trajectory_does_not(
    tokenizer: Any, renderer: ChatRenderer
) -> None:
    game = Sluggish(slow=(1,))  # 0.05 seconds a turn
    speaker = Speaker(tokenizer, "12345", "1234", "123", "12", "1")
    limits = {"max_turns": 5, "max_context_tokens": 400}
    turn, whole = Deadlines(turn_seconds=0.15), Deadlines(trajectory_seconds=0.12)
    (played,) = play(loop_of(ScriptedEngine(speaker), renderer, game, deadlines=turn, limits=limits), 1)
    (ended,) = play(loop_of(ScriptedEngine(speaker), renderer, game, deadlines=whole, limits=limits), 1)
    assert (played.success, len(played.turns)) == (True, 5)
    assert ended.failed
    assert 1 <= len(ended.turns) < 5


def test_play_ends_when_it_is_told_to(tokenizer: Any, renderer: ChatRenderer, hanging: Hanging) -> None:
    loop = loop_of(ScriptedEngine(Speaker(tokenizer, "12345")), renderer, hanging)
    threading.Timer(0.1, setattr, (loop.turnstile, "stopped", True)).start()
    with pytest.raises(Stopped):
        play(loop, 1)


def test_what_was_finished_while_others_used_the_engine_is_played_on(tokenizer: Any, renderer: ChatRenderer) -> None:
    engine = ScriptedEngine(Speaker(tokenizer, "12345", "1"), batch=0)
    loop = loop_of(engine, renderer, Countdown())
    submit = engine.submit

    def finish_elsewhere(request: Request) -> None:
        submit(request)
        engine.batch = 1
        loop.turnstile.stash += engine.step()
        engine.batch = 0

    engine.submit = finish_elsewhere  # type: ignore[method-assign]
    (trajectory,) = play(loop, 1)
    assert [turn.text for turn in trajectory.turns] == ["12345", "1"]
    assert loop.turnstile.stash == []


def test_an_engine_that_dies_leaves_attempts_that_can_be_given_up(tokenizer: Any, renderer: ChatRenderer) -> None:
    def speak(request: Request) -> Sequence[int]:
        if request.request_id == "1-0-1":
            raise EngineError("the engine is gone")
        return tokenizer({"0": "1", "1": "12345"}[request.request_id[0]])["input_ids"]

    loop, attempts = loop_of(ScriptedEngine(speak), renderer, Countdown()), attempts_at(1, 1, sampling=Sampling())
    with pytest.raises(EngineError, match="the engine is gone"):
        loop.play(attempts)
    loop.give_up(attempts, "the engine failed")
    done, lost = (attempt.trajectory() for attempt in attempts)
    assert (done.success, lost.failure, len(lost.turns)) == (True, "the engine failed", 1)
