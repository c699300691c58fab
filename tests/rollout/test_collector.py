"""Which tasks are played, and what a phase of play reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from lightning.fabric import Fabric

from lit_stepwise.engines import VLLMServerEngine
from lit_stepwise.errors import ConfigError, EngineError
from lit_stepwise.rollout.collector import Collector, Replica, refuse_far_engines
from lit_stepwise.rollout.rendering import ChatRenderer
from lit_stepwise.testing import Countdown, CountdownTask, ScriptedEngine
from lit_stepwise.types import Completion, Deadlines, Limits, Prepared, Sampling, Task


class Choosy(Countdown):
    """Plays no even goal, and counts its turns."""

    turns = 0

    def prepare(self, tasks: Sequence[Task]) -> Prepared:
        return Prepared([task for task in tasks if task.goal % 2], "even goals are no good")  # type: ignore[attr-defined]

    def stats(self) -> Mapping[str, float]:
        type(self).turns += 10
        return {"turns": self.turns}


@pytest.fixture(scope="module")
def renderer(tiny_model: Any) -> ChatRenderer:
    from transformers import AutoTokenizer

    return ChatRenderer.of(AutoTokenizer.from_pretrained(tiny_model))


def collector(renderer: ChatRenderer, max_prompt_tokens: int = 200) -> Collector:
    limits = Limits(max_prompt_tokens=max_prompt_tokens, max_context_tokens=300, max_turns=1)
    fabric = Fabric(accelerator="cpu", devices=1)
    engine = ScriptedEngine(lambda request: [1, 2])
    engine.start("", 300)
    return Collector(fabric, engine, Choosy(), renderer, limits, Deadlines(), deterministic=True, num_threads=2, seed=0)


def tasks(*goals: int) -> list[Task]:
    return [CountdownTask(task_id=f"goal-{goal}", goal=goal) for goal in goals]


def test_a_rank_whose_engine_follows_another_plays_nothing_and_has_no_seconds_of_it(
    renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replica, "of", lambda *_: Replica(0, 1, leads=False))
    following = collector(renderer)
    monkeypatch.setattr(following.engine, "follow", lambda: None, raising=False)
    rollout = following.play(tasks(1, 3), [Sampling()], stage="train", iteration=0)
    assert (rollout.trajectories, rollout.engine_seconds) == ([], None)


def test_only_what_the_environment_can_play_is_played(renderer: ChatRenderer) -> None:
    given = tasks(1, 2, 3)
    prepared = collector(renderer).choose(given)
    assert list(prepared.tasks) == [given[0], given[2]]
    assert prepared.report == "even goals are no good"


def test_prompts_over_their_budget_are_left_out_and_counted(renderer: ChatRenderer) -> None:
    given = tasks(7, 12345, 9, 8, 123456789)
    limit = len(collector(renderer).first_prompt(given[0]))
    longest = len(collector(renderer).first_prompt(given[4]))
    prepared = collector(renderer, limit).choose(given)
    assert [task.task_id for task in prepared.tasks] == ["goal-7", "goal-9"]
    assert prepared.report == (
        f"even goals are no good\nrollout.limits.max_prompt_tokens={limit}, but the first prompts of 2 of 4 tasks are "
        f"longer, the longest (goal-123456789) with {longest} tokens; they are left out"
    )


def test_it_is_an_error_when_no_prompt_is_within_its_budget(renderer: ChatRenderer) -> None:
    with pytest.raises(ConfigError, match=r"max_prompt_tokens=5, .* of 2 of 2 tasks are longer, .*; raise it to \d+ "):
        collector(renderer, 5).choose(tasks(1, 3))


def test_a_phase_reports_what_the_counters_of_the_environment_grew_by(renderer: ChatRenderer) -> None:
    rollout = collector(renderer).play(tasks(1), [Sampling()], stage="train", iteration=0)
    assert rollout.environment_stats == {"turns": 10}


def test_a_further_phase_of_an_iteration_counts_its_groups_on(renderer: ChatRenderer) -> None:
    rollout = collector(renderer).play(
        tasks(1, 3), [Sampling(0.5), Sampling(0.25)], stage="train", iteration=0, first_group=5
    )
    assert [(each.group, each.sample, each.temperature) for each in rollout.trajectories] == [
        (5, 0, 0.5),
        (5, 1, 0.25),
        (6, 0, 0.5),
        (6, 1, 0.25),
    ]


def test_a_phase_may_take_fewer_turns_than_the_limits_leave(renderer: ChatRenderer) -> None:
    playing = collector(renderer)
    playing.limits = Limits(max_prompt_tokens=200, max_context_tokens=300, max_turns=3)
    num_turns = [
        len(playing.play(tasks(1), [Sampling()], stage="train", iteration=0, max_turns=most).trajectories[0].turns)
        for most in (2, None)
    ]
    assert num_turns == [2, 3]


def test_the_lengths_of_the_prompts_that_were_chosen_are_kept(renderer: ChatRenderer) -> None:
    given = tasks(7, 12345, 8, 9)
    playing = collector(renderer, len(collector(renderer).first_prompt(given[0])))
    playing.choose(given)
    length = len(playing.first_prompt(given[0]))
    assert playing.prompt_tokens == {id(given[0]): length, id(given[3]): length}


class Ranks:
    """A fabric of several ranks, as seen by one of them."""

    def __init__(self, global_rank: int, world_size: int) -> None:
        self.global_rank = global_rank
        self.world_size = world_size


def test_neighbouring_ranks_share_an_engine_and_the_first_of_them_leads() -> None:
    engine = ScriptedEngine(lambda request: [1])
    engine.tensor_parallel_size = 2
    replicas = [Replica.of(Ranks(rank, 6), engine) for rank in range(6)]  # type: ignore[arg-type]
    assert [(each.index, each.count, each.leads) for each in replicas] == [
        (0, 3, True),
        (0, 3, False),
        (1, 3, True),
        (1, 3, False),
        (2, 3, True),
        (2, 3, False),
    ]


def test_ranks_that_cannot_be_shared_out_evenly_are_refused_with_what_would_work() -> None:
    engine = ScriptedEngine(lambda request: [1])
    engine.tensor_parallel_size = 4
    with pytest.raises(ConfigError, match=r"size=4 does not divide the 6 ranks .* use one of 1, 2, 3, 6,"):
        Replica.of(Ranks(0, 6), engine)  # type: ignore[arg-type]


class Mortal(ScriptedEngine):
    """Fails with its third answer."""

    ended = 0

    def step(self) -> list[Completion]:
        if len(self.requests) > 2:
            raise EngineError("out of order")
        return super().step()

    def end_phase(self) -> None:
        self.ended += 1


def test_an_engine_that_fails_ends_the_phase_but_not_the_run(renderer: ChatRenderer) -> None:
    playing = collector(renderer)
    playing.engine = Mortal(lambda request: [1, 2])
    playing.limits = Limits(max_prompt_tokens=200, max_context_tokens=300, max_turns=2)
    rollout = playing.play(tasks(1, 3), [Sampling()], stage="train", iteration=0)
    assert rollout.engine_failure == "out of order"
    assert {each.failure for each in rollout.trajectories} == {"the engine failed"}
    assert playing.engine.ended == 1


@pytest.mark.parametrize(
    ("size", "machines", "message"),
    [
        (4, [0, 0, 1, 1], "tensor_parallel_size=4 .* ranks 0 to 3 span the machines 0 and 1, .*use one of 1, 2$"),
        (2, [0, 0, 0, 1, 1, 1], "tensor_parallel_size=2 .* ranks 2 to 3 span the machines 0 and 1, .*use one of 1, 3$"),
        (2, [0, 1, 0, 1], "ranks 0 to 1 span the machines 0 and 1"),  # as SLURM deals them out in turn
        (2, [0, 0, 1, 1], None),
        (3, [0, 0, 0], None),
    ],
)
def test_the_ranks_of_an_engine_are_on_one_machine(size: int, machines: list[int], message: str | None) -> None:
    engine = ScriptedEngine(lambda request: [5])
    engine.tensor_parallel_size = size
    if message is None:
        refuse_far_engines(engine, machines)
    else:
        with pytest.raises(ConfigError, match=message):
            refuse_far_engines(engine, machines)


def test_servers_that_a_run_starts_are_for_one_machine() -> None:
    refuse_far_engines(VLLMServerEngine(), [0, 0])
    refuse_far_engines(VLLMServerEngine(urls=["http://node3:8000"]), [0, 0, 1, 2])
    with pytest.raises(ConfigError, match=r"other 2 of the 3 machines cannot reach.*name them in rollout.engine.urls"):
        refuse_far_engines(VLLMServerEngine(), [0, 0, 1, 2])
