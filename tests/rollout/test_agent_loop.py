"""Many attempts at their own pace, on a scripted engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lit_stepwise.interfaces import Environment, Episode
from lit_stepwise.rollout.agent_loop import AgentLoop, Attempt, mix_seed
from lit_stepwise.rollout.rendering import ChatRenderer
from lit_stepwise.testing import Countdown, CountdownTask, ScriptedEngine
from lit_stepwise.types import Feedback, Limits, Message, Request, Sampling, StopReason, Task, Trajectory


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
    return AgentLoop(engine, environment, renderer, limits, Sampling(), settings.get("deterministic", True), 4)


def play(loop: AgentLoop, *goals: int) -> list[Trajectory]:
    attempts = [
        Attempt(CountdownTask(task_id=f"goal-{goal}", goal=goal), i, 0, (5, 0, 2)) for i, goal in enumerate(goals)
    ]
    loop.play(attempts)
    return [attempt.trajectory(1.0) for attempt in attempts]


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
    loop = AgentLoop(engine, game, renderer, Limits(60, 120), Sampling(0.25, 0.5, ("!",)), True, 1)
    play(loop, 3)
    assert [request.sampling for request in engine.requests] == [Sampling(0.25, 0.5, ("</move>", "!"))]


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
            assert self.opened.wait(20), "the other attempt was held up by this one"
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
