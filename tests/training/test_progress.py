"""What is said of a run: in a terminal, and in a file."""

from __future__ import annotations

import re
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from lit_stepwise.training.progress import RolloutProgressBar
from lit_stepwise.types import Rollout, StopReason, Trajectory

TRAJECTORY = Trajectory("a", 0, 0, [], StopReason.DONE)
MODULE: Any = SimpleNamespace(step_plan=[[4, 5], [6], [7]])


@pytest.fixture
def bar(monkeypatch: pytest.MonkeyPatch) -> Any:
    bar = RolloutProgressBar()
    monkeypatch.setattr(bar, "get_metrics", lambda trainer, module: dict(trainer.metrics, v_num=3))
    yield bar
    bar.on_train_end(trainer(), MODULE)


def trainer(step: int = 0, **metrics: float) -> Any:
    return SimpleNamespace(estimated_stepping_batches=8, global_step=step, metrics=metrics)


def drawn(bar: RolloutProgressBar) -> list[str]:
    """Label, count and note of each line, without its bar and times."""
    return [f"{each.label} {each.count()} {each.note}".strip() for each in bar._activities()]


def play_and_train(bar: RolloutProgressBar, step: int, **metrics: float) -> None:
    """An iteration of one optimizer step."""
    bar.on_phase("play")
    bar.on_rollout_start("train", step, 5)
    bar.on_trajectory_end(TRAJECTORY)
    bar.on_rollout_end(Rollout("train", step, step, [TRAJECTORY]))
    bar.on_phase("train")
    bar.on_train_batch_end(trainer(step + 1, **metrics), MODULE, None, None, 0)
    bar.on_phase("other")
    bar.on_train_epoch_end(trainer(step + 1, **metrics), MODULE)


def test_in_a_file_there_is_a_plain_line_for_each_iteration(
    bar: RolloutProgressBar, capsys: pytest.CaptureFixture[str]
) -> None:
    bar.on_phase("evaluate")
    bar.on_phase("other")
    bar.on_train_start(trainer(step=2, accuracy=0.25), MODULE)
    play_and_train(bar, step=2, reward=0.5, accuracy=0.25)
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()
    assert re.match(r"step 2/8  accuracy 0.250  \d\.\d s", first), first
    assert re.match(r"step 3/8  reward 0.500  \d\.\d s, 0:0\d left", second), second
    assert "\x1b" not in captured.out + captured.err
    assert "\r" not in captured.out + captured.err


def test_the_lines_say_what_is_played_executed_trained_and_saved(bar: RolloutProgressBar) -> None:
    bar.on_train_start(trainer(step=2), MODULE)
    bar.on_phase("play")
    bar.on_rollout_start("train", 1, 5)
    bar.on_engine_step(num_generating=3, num_executing=2)
    bar.on_trajectory_end(TRAJECTORY)
    assert drawn(bar) == ["run 2/8", "playing 1/5 2 executing"]
    bar.on_engine_step(num_generating=4, num_executing=0)
    assert drawn(bar) == ["run 2/8", "playing 1/5"]
    bar.on_phase("train")
    bar.on_before_backward(trainer(), MODULE, None)
    bar.on_after_backward(trainer(), MODULE)
    assert drawn(bar)[:2] == ["run 2/8", "training 1/3"]
    bar.on_phase("save")
    assert drawn(bar)[:2] == ["run 2/8", "saving"]


def test_play_ahead_has_a_line_of_its_own_for_as_long_as_it_lasts(bar: RolloutProgressBar) -> None:
    bar.on_train_start(trainer(step=2), MODULE)
    bar.on_phase("train")

    def play() -> None:
        bar.on_rollout_start("train", 1, 2)
        bar.on_trajectory_end(TRAJECTORY)

    thread = threading.Thread(target=play)
    thread.start()
    thread.join()
    bar.on_before_backward(trainer(), MODULE, None)
    bar.on_after_backward(trainer(), MODULE)
    assert drawn(bar) == ["run 2/8", "training 1/3", "playing 1/2"]
    bar.on_trajectory_end(TRAJECTORY)
    assert drawn(bar) == ["run 2/8", "training 1/3"]


def test_a_run_without_an_end_has_no_total(bar: RolloutProgressBar, capsys: pytest.CaptureFixture[str]) -> None:
    endless = trainer(step=2)
    endless.estimated_stepping_batches = float("inf")
    bar.on_train_start(endless, MODULE)
    play_and_train(bar, step=2)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["step 2", "step 3"]


def test_what_ends_a_run_is_placed(bar: RolloutProgressBar, capsys: pytest.CaptureFixture[str]) -> None:
    bar.on_train_start(trainer(step=2), MODULE)
    bar.on_phase("play")
    bar.on_rollout_start("train", 1, 5)
    bar.on_exception(trainer(), MODULE, KeyboardInterrupt())
    assert capsys.readouterr().out.splitlines()[-1] == "ended at step 2/8, playing 0/5"


@pytest.mark.clock
def test_a_long_silence_in_a_file_is_broken(
    bar: RolloutProgressBar, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_stepwise.training.progress._SAY_SECONDS", 0.04)
    bar.on_phase("play")
    bar.on_rollout_start("evaluate", -1, 7)
    threading.Event().wait(0.2)
    assert "playing 0/7" in capsys.readouterr().out.splitlines()


def test_other_ranks_say_nothing(bar: RolloutProgressBar, capsys: pytest.CaptureFixture[str]) -> None:
    bar.disable()
    bar.on_train_start(trainer(), MODULE)
    play_and_train(bar, step=0)
    assert capsys.readouterr() == ("", "")
