"""An iteration, from tasks to training rows, on a scripted engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lit_stepwise.algo import Filters, GiGPO, GroupRelative
from lit_stepwise.algo.filters import Selection
from lit_stepwise.errors import ConfigError, EngineError, MismatchError, StepwiseError
from lit_stepwise.rollout import RolloutCallback
from lit_stepwise.rollout.phases import Draw
from lit_stepwise.store.read import open_run, rows_of
from lit_stepwise.testing import Countdown, CountdownTask, ScriptedEngine
from lit_stepwise.types import Completion, Evaluation, Limits, Request, Rollout, Sampling, Task, Trajectory, Turn


class FixedPolicy:
    """Scores as the scripted engine does, and may ask a price for every token."""

    adapter_rank = staleness = 0

    def __init__(self, model_path: Path, price: float | None = None) -> None:
        self.model_path = str(model_path)
        self.price = price
        self.gap = 0.0

    def weights(self, merged: bool = True) -> Iterable[tuple[str, Tensor]]:
        return iter(())

    def score(self, said: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[Tensor, Tensor]]:
        return [(torch.full((len(response_ids),), -0.5),) * 2 for _, response_ids in said]

    def logprob_gap(self) -> float:
        return self.gap

    def reference_penalties(self, turns: Sequence[Turn], temperature: float) -> list[float] | None:
        return None if self.price is None else [self.price * len(turn.response_ids) for turn in turns]


class Listener:
    """Keeps what it is told of."""

    def __init__(self) -> None:
        self.selections: list[Selection] = []
        self.credit: list[tuple[int, list[tuple[int, int, list[float]]]]] = []
        self.rollouts: list[Rollout] = []

    def on_selection(
        self, iteration: int, trajectories: list[Trajectory], advantages: list[list[float]], selection: Selection
    ) -> None:
        self.selections.append(selection)
        rows = zip(trajectories, advantages, strict=True)
        self.credit.append((iteration, [(each.group, each.sample, values) for each, values in rows]))

    def on_rollout_end(self, rollout: Rollout) -> None:
        self.rollouts.append(rollout)


def speak(request: Request) -> list[int]:
    """Even samples of odd groups say two tokens and then one; everybody else says one at once.

    A goal of 1 is reached by a single token, so groups of odd number differ in reward and all succeed.
    """
    if request.request_id.startswith("probe"):
        return [70]
    group, sample, turn = map(int, request.request_id.split("-"))
    return [70, 71] if group % 2 and not sample % 2 and turn == 0 else [72]


@pytest.fixture
def attached(tiny_model: Path, tmp_path: Path) -> Iterator[Any]:
    made: list[RolloutCallback] = []

    def make(
        num_tasks: int = 2, num_further: int = 0, price: float | None = None, version: Callable[[], int] = lambda: 0,
        **settings: Any,
    ) -> tuple[RolloutCallback, Listener]:  # fmt: skip
        given = {"engine": ScriptedEngine(speak), "environment": Countdown(), "deterministic": True} | settings
        callback = RolloutCallback(
            advantage=GroupRelative(norm_by_std=False), samples_per_task=2, limits=Limits(100, 200, 8, 3), **given
        )
        listener = Listener()
        fabric = Fabric(accelerator="cpu", devices=1, callbacks=[listener])
        further = iter(tasks(9)[num_tasks : num_tasks + num_further])
        callback.attach(
            fabric,
            FixedPolicy(tiny_model, price),
            tasks(9),
            tmp_path,
            version,
            draw=lambda iteration: Draw(tasks(num_tasks), further),
            wanted=lambda iteration: iteration < 4,
        )
        callback.further = further
        made.append(callback)
        return callback, listener

    yield make
    for callback in made:
        callback.close()


def tasks(num: int) -> list[Task]:
    return [CountdownTask(task_id=f"task-{number}", goal=1) for number in range(num)]


def test_every_turn_becomes_a_row_or_every_trajectory_does(attached: Any) -> None:
    steps = attached()[0].collect(0)
    whole = attached(samples="trajectory")[0].collect(0)
    assert [(row.group, row.sample, row.turn) for row in steps] == [
        (0, 0, 0),
        (0, 1, 0),
        (1, 0, 0),
        (1, 0, 1),
        (1, 1, 0),
    ]
    assert [(row.group, row.sample, row.num_response_tokens) for row in whole] == [
        (0, 0, 1),
        (0, 1, 1),
        (1, 0, 3),
        (1, 1, 1),
    ]


def test_groups_without_a_difference_are_replaced_by_further_tasks_until_there_are_enough(attached: Any) -> None:
    callback, listener = attached(filters=Filters(dynamic_sampling="reward"), num_further=7)
    rows = callback.collect(0)  # group 0 is uniform, 1 is not; then group 2 is, and then 3 is not
    assert {row.group for row in rows} == {1, 3}
    assert [each.task_id for each in callback.further] == [f"task-{number}" for number in range(4, 9)]
    (selection,) = listener.selections
    assert (selection.rounds, selection.groups_in, selection.groups_uniform, selection.groups_kept) == (3, 4, 2, 2)
    (rollout,) = listener.rollouts  # the rounds are one
    assert [(each.group, each.sample) for each in rollout.trajectories] == [(g, s) for g in range(4) for s in range(2)]


def test_callbacks_hear_what_every_turn_of_an_iteration_was_worth(attached: Any) -> None:
    callback, listener = attached()
    callback.collect(4)
    # group 1: one attempt earns 0.5 and 1.5, the other 1.5
    assert listener.credit == [(4, [(0, 0, [0.0]), (0, 1, [0.0]), (1, 0, [0.25, 0.25]), (1, 1, [-0.25])])]


def test_filling_up_ends_at_its_bound(attached: Any) -> None:
    bound = {"dynamic_sampling": "success", "max_rounds": 2}
    callback, listener = attached(filters=Filters(**bound), num_further=7)
    assert callback.collect(0) == []  # all solved, so that none differs in success
    assert (listener.selections[0].groups_in, listener.selections[0].rounds) == (4, 2)
    with pytest.raises(StepwiseError, match=r"max_rounds=2.* gave 0 of 2 groups"):
        attached(filters=Filters(**bound, at_bound="error"), num_further=7)[0].collect(0)


def test_filling_up_ends_with_the_tasks(attached: Any) -> None:
    callback, listener = attached(filters=Filters(dynamic_sampling="success"), num_further=1)
    assert callback.collect(0) == []
    assert (listener.selections[0].groups_in, listener.selections[0].rounds) == (3, 2)


def test_groups_without_an_advantage_may_be_left_out(attached: Any) -> None:
    rows = attached(4, filters=Filters(drop_flat_groups=True))[0].collect(0)
    assert {row.group for row in rows} == {1, 3}


def test_the_price_of_leaving_the_reference_is_a_component_of_the_reward(attached: Any, tmp_path: Path) -> None:
    rows = attached(1, price=0.25)[0].collect(3)
    assert [row.reward for row in rows] == [1.5 - 0.25] * 2
    (first, _) = rows_of(open_run(tmp_path), "select * from turns where iteration = 3")
    assert first["rewards"] == {"shorter": 0.5, "goal": 1.0, "kl": -0.25}


def test_the_store_says_why_a_trajectory_is_not_trained(attached: Any, tmp_path: Path) -> None:
    attached(4, filters=Filters(drop_flat_groups=True))[0].collect(0)
    query = "select distinct group_id, trained, left_out from turns order by group_id"
    assert open_run(tmp_path).execute(query).fetchall() == [
        (0, False, "flat"), (1, True, None), (2, False, "flat"), (3, True, None),
    ]  # fmt: skip


def test_length_may_cost(attached: Any) -> None:
    filters = Filters(overlong_margin_tokens=8, overlong_penalty=4.0)
    rows = attached(filters=filters)[0].collect(0)
    # of 8 tokens each costs 0.5: one token at once, or two and then one
    assert [row.reward for row in rows if row.turn == 0] == [1.0, 1.0, 0.5 - 1.0, 1.0]


def test_settings_that_do_not_fit_each_other_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"GiGPO compares turns .*=Countdown offers no state keys"):
        RolloutCallback(ScriptedEngine(speak), Countdown(), GiGPO())
    with pytest.raises(ConfigError, match=r"overlong_margin_tokens=300 exceeds rollout\.limits\.max_new_tokens=256"):
        RolloutCallback(
            ScriptedEngine(speak), Countdown(), GroupRelative(), filters=Filters(overlong_margin_tokens=300)
        )
    with pytest.raises(ConfigError, match=r"staleness=1 lets weights arrive .* use deterministic: false"):
        RolloutCallback(ScriptedEngine(speak), Countdown(), GroupRelative(), staleness=1, deterministic=True)
    wide = ScriptedEngine(speak)
    wide.tensor_parallel_size = 2
    with pytest.raises(ConfigError, match=r"staleness=1 cannot play beside .*_size=2 .* VLLMServerEngine"):
        RolloutCallback(wide, Countdown(), GroupRelative(), staleness=1)
    with pytest.raises(ConfigError, match=r"rollout.max_engine_restarts=-1 is negative"):
        RolloutCallback(ScriptedEngine(speak), Countdown(), GroupRelative(), max_engine_restarts=-1)


# ---- evaluation


def test_evaluation_plays_every_task_greedily_and_as_often_at_random_as_asked(attached: Any) -> None:
    evaluation = Evaluation(samples_per_task=2, temperature=0.75)
    with pytest.warns(UserWarning, match=r"top_p=0.5 .* up to 0.693 nats above those of the whole one"):
        callback, _ = attached(evaluation=evaluation, sampling=Sampling(top_p=0.5))
    rollout = callback.evaluate(tasks(2))
    assert [(each.group, each.sample, each.temperature) for each in rollout.trajectories] == [
        (group, sample, temperature) for group in range(2) for sample, temperature in enumerate((0.0, 0.75, 0.75))
    ]
    asked = [request.sampling for request in callback.engine.requests if request.request_id == "1-2-0"]
    assert asked == [Sampling(0.75, 0.5)]  # what evaluation does not say is as in training


# ---- what fails


class Frail(ScriptedEngine):
    """Dies when it has answered as many requests as ``deaths`` say; a started one is well again."""

    def __init__(self, *deaths: int) -> None:
        super().__init__(speak)
        self.deaths = list(deaths)
        self.starts = self.answers = 0

    def start(self, model_path: str, max_context_tokens: int, adapter_rank: int = 0) -> None:
        self.starts += 1
        self.dead, self._version = False, -1
        self._pending.clear()

    def sleep(self) -> None:
        if self.dead:
            raise EngineError("sleep was called before start")

    def step(self) -> list[Completion]:
        plays = bool(self._pending) and not self._pending[0].request_id.startswith("probe")
        if plays and self.answers in self.deaths:
            self.deaths.remove(self.answers)
            self.dead = True
        if self.dead:
            raise EngineError("the engine is gone; its last words: out of memory")
        self.answers += plays
        return super().step()


def test_an_engine_that_dies_ends_the_run_with_its_last_words(attached: Any) -> None:
    with pytest.raises(EngineError, match=r"rollout.max_engine_restarts=0; .* last words: out of memory"):
        attached(engine=Frail(2))[0].collect(0)


def test_an_engine_that_may_be_restarted_loses_what_it_was_busy_with(attached: Any) -> None:
    engine = Frail(4)  # at the second turn of group 1, sample 0; the others had but one
    callback, _ = attached(engine=engine, max_engine_restarts=1)
    lost = r"^1 of 4 trajectories of iteration 0 failed and are left out, 1 of them with 'the engine failed'$"
    with pytest.warns(UserWarning, match=r"started again, restart 1 of"), pytest.warns(UserWarning, match=lost):
        rows = callback.collect(0)
    assert [(row.group, row.sample, row.turn) for row in rows] == [(0, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert len(callback.collect(1)) == 5
    assert engine.starts == 2


def test_when_everything_is_lost_the_iteration_is_played_again(attached: Any) -> None:
    engine = Frail(0, 0)
    callback, _ = attached(engine=engine, max_engine_restarts=2)
    with pytest.warns(UserWarning, match="started again"):
        rows = callback.collect(0)
    assert (len(rows), engine.starts) == (5, 3)


def test_an_evaluation_is_whole_or_played_again(attached: Any) -> None:
    callback, _ = attached(engine=Frail(3), max_engine_restarts=1)
    with pytest.warns(UserWarning, match="started again"):
        rollout = callback.evaluate(tasks(4))
    assert [each.failed for each in rollout.trajectories] == [False] * 4


def test_a_run_all_of_whose_trajectories_fail_ends_with_the_commonest_reason(attached: Any) -> None:
    callback, _ = attached(environment=Countdown(fail_on=""))
    with pytest.raises(StepwiseError, match=r"all 4 trajectories of iteration 0 failed, 4 of them with 'the game "):
        callback.collect(0)


# ---- ahead


def ahead(attached: Any, **settings: Any) -> tuple[RolloutCallback, Listener, list[int]]:
    version = [0]
    settings = {"staleness": 1} | settings
    callback, listener = attached(deterministic=False, version=lambda: version[0], **settings)
    return callback, listener, version


def test_the_next_iteration_is_played_while_one_is_trained_and_none_that_nobody_wants(attached: Any) -> None:
    callback, listener, version = ahead(attached)
    sampled = []
    for iteration in range(4):
        callback.collect(iteration)
        sampled.append({turn.policy_version for each in listener.rollouts[-1].trajectories for turn in each.turns})
        callback.live.phases.ahead.settle()  # the next one is played before the trainer has done its step
        version[0] += 1
    assert sampled == [{0}, {0}, {1}, {2}]
    assert [each.iteration for each in listener.rollouts] == [0, 1, 2, 3]
    assert max(int(name.split("-")[0]) for name in played_names(callback)) == 1
    assert len(callback.engine.phases) == 4 + 4  # one each, and one for the probe after each of the versions 0 to 3


def played_names(callback: RolloutCallback) -> list[str]:
    return [each.request_id for each in callback.engine.requests if not each.request_id.startswith("probe")]


class Patient(ScriptedEngine):
    """Takes its time, and says which weights sampled which token."""

    def __init__(self) -> None:
        super().__init__(speak)
        self.held = threading.Event()
        self.held.set()

    def step(self) -> list[Completion]:
        if not self.held.is_set() and not any(each.request_id.startswith("probe") for each in self._pending):
            time.sleep(0.001)
            return []
        return super().step()


@pytest.mark.clock
def test_new_weights_reach_what_is_in_play_and_a_probe_proves_them(attached: Any) -> None:
    engine = Patient()
    callback, listener, version = ahead(attached, engine=engine)
    callback.collect(0)
    callback.live.phases.ahead.settle()
    version[0] = 1
    engine.held.clear()
    callback.collect(1)  # had been played; iteration 2 is in play now, and held
    version[0] = 2
    threading.Timer(0.2, engine.held.set).start()
    callback.collect(2)
    versions = {turn.policy_version for each in listener.rollouts[-1].trajectories for turn in each.turns}
    assert versions == {2}
    probes = [each for each in engine.requests if each.request_id == "probe-0"]
    assert len(probes) == 3


def test_an_engine_that_dies_while_it_plays_ahead_is_started_again(attached: Any) -> None:
    callback, _, version = ahead(attached, engine=Frail(7), max_engine_restarts=1)
    callback.collect(0)
    callback.live.phases.ahead.settle()
    version[0] = 1
    with pytest.warns(UserWarning, match="started again"):
        rows = callback.collect(1)
    assert 0 < len(rows) <= 5
    assert len(callback.collect(2)) == 5


def test_evaluation_waits_for_what_is_in_play(attached: Any) -> None:
    callback, _, version = ahead(attached)
    callback.collect(0)
    version[0] = 1
    rollout = callback.evaluate(tasks(3))
    assert {turn.policy_version for each in rollout.trajectories for turn in each.turns} == {1}
    assert len(callback.collect(1)) == 5


@pytest.mark.clock
def test_closing_ends_what_is_in_play(attached: Any) -> None:
    engine = Patient()
    callback, _, _ = ahead(attached, engine=engine)
    callback.collect(0)
    engine.held.clear()
    callback.live.phases.ahead.start(9)
    began = time.monotonic()
    callback.close()
    assert time.monotonic() - began < 4
    while any(thread.name.startswith("play") for thread in threading.enumerate()):
        assert time.monotonic() - began < 4
        time.sleep(0.01)


@pytest.mark.clock
def test_waiting_and_idling_are_measured_between_one_iteration_and_the_next(attached: Any) -> None:
    callback, listener, _ = ahead(attached)
    for iteration in range(2):
        callback.collect(iteration)
        callback.live.phases.ahead.settle()
        time.sleep(0.5)
    first, second = listener.rollouts
    assert (first.cycle_seconds, first.wait_seconds > 0) == (0.0, True)
    assert second.wait_seconds < 0.4 < 0.5 < second.cycle_seconds


def test_the_engines_work_counts_where_it_was_done_and_not_where_it_is_handed_over(attached: Any) -> None:
    callback, listener, _ = ahead(attached, staleness=2)
    for iteration in range(3):
        callback.collect(iteration)
        callback.live.phases.ahead.settle()  # at first of both that follow
    first, second, third = listener.rollouts
    assert first.busy_seconds is None
    assert second.busy_seconds >= second.engine_seconds + third.engine_seconds
    assert 0 < third.busy_seconds <= third.cycle_seconds


# ---- the first optimizer step


def step_with(callback: RolloutCallback, gap: float) -> None:
    policy = callback.live.policy
    policy.gap = gap
    callback.on_before_optimizer_step(None, policy, None)  # type: ignore[arg-type]


def test_nothing_is_learnt_from_an_engine_whose_samples_are_not_the_policys(attached: Any) -> None:
    callback, _ = attached(max_logprob_gap=0.3)
    step_with(callback, 0.9)  # nothing was played yet: a resumed run trains what it had stored
    callback.collect(0)
    with pytest.raises(MismatchError, match=r"first optimizer step .* 0\.9000 nats off .*max_logprob_gap=0\.3"):
        step_with(callback, 0.9)


def test_later_steps_may_differ_by_what_was_learnt(attached: Any) -> None:
    callback, _ = attached(max_logprob_gap=0.3)
    callback.collect(0)
    step_with(callback, 0.2)
    step_with(callback, 0.9)


def test_a_cut_distribution_is_told_its_bias_as_measured(attached: Any) -> None:
    with pytest.warns(UserWarning, match="cut distribution"):
        callback, _ = attached(max_logprob_gap=0.1, sampling=Sampling(top_p=0.75))
    callback.collect(0)
    with pytest.warns(UserWarning, match=r"0\.2500 nats off .*; that is how much rollout.sampling.top_p=0.75 biases"):
        step_with(callback, 0.25)
