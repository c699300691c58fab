"""What the bar shows, caught at its source."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lit_stepwise.training.progress import RolloutProgressBar
from lit_stepwise.types import Rollout, StopReason, Trajectory


@pytest.fixture
def bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RolloutProgressBar:
    bar = RolloutProgressBar()
    monkeypatch.setattr(bar, "get_metrics", lambda trainer, module: dict(trainer.metrics, v_num=3))
    return bar


def trainer(step: int = 0, **metrics: float) -> Any:
    return SimpleNamespace(estimated_stepping_batches=8, global_step=step, metrics=metrics)


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]


TRAJECTORY = Trajectory("a", 0, 0, [], StopReason.DONE)


def test_the_bar_counts_optimizer_steps_and_says_what_is_played(
    bar: RolloutProgressBar, capsys: pytest.CaptureFixture[str]
) -> None:
    bar.on_validation_end(trainer(accuracy=0.25), None)  # the sanity check, before there is a bar
    bar.on_train_start(trainer(step=2), None)
    assert "2/8" in shown(capsys)
    bar.on_rollout_start("train", 1, 5)
    bar.on_trajectory_end(TRAJECTORY)
    bar.on_rollout_end(Rollout("train", 1, 2, [TRAJECTORY]))
    assert "training" in shown(capsys)
    bar.on_train_batch_end(trainer(step=3, reward=0.5), None, None, None, 0)
    assert (line := shown(capsys)).startswith("training")
    assert "3/8" in line
    assert "accuracy=0.250" in line
    assert "reward=0.500" in line
    assert "v_num" not in line
    bar.on_train_end(trainer(step=3), None)


def test_outside_of_training_the_bar_counts_trajectories(
    bar: RolloutProgressBar, capsys: pytest.CaptureFixture[str]
) -> None:
    bar.on_rollout_start("evaluate", -1, 2)
    bar.on_trajectory_end(TRAJECTORY)
    bar.on_trajectory_end(TRAJECTORY)
    bar.on_rollout_end(Rollout("evaluate", -1, 0, [TRAJECTORY] * 2))
    assert "2/2" in shown(capsys)


def test_other_ranks_show_nothing(bar: RolloutProgressBar, capsys: pytest.CaptureFixture[str]) -> None:
    bar.disable()
    bar.on_train_start(trainer(), None)
    bar.on_rollout_start("train", 0, 3)
    assert capsys.readouterr().err == ""
