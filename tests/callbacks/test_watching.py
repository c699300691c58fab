"""What the callbacks of the gallery show, and when they step in."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from callbacks.kl_early_stop import KLEarlyStop
from callbacks.logprob_gap_guard import LogprobGapGuard
from callbacks.pass_at_k import PassAtK
from callbacks.sample_printer import SamplePrinter, printable
from callbacks.trajectory_table import TrajectoryTable
from lit_stepwise.errors import ConfigError
from lit_stepwise.types import Feedback, StopReason, Trajectory, Turn, VersionSpan


def turn(text: str, observation: str = "", **rewards: float) -> Turn:
    return Turn([1], [2], [-0.5], [VersionSpan(0, 1)], text, Feedback(observation, rewards))


def trajectory(sample: int, *turns: Turn, failure: str = "") -> Trajectory:
    reason = StopReason.FAILED if failure else StopReason.MAX_TURNS
    return Trajectory("task-a", 0, sample, turns, reason, failure=failure)


# ---- tables


class TextLogger(TensorBoardLogger):
    """Keeps the text."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str, int]] = []

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(add_text=lambda *given: self.texts.append(given))


def test_a_table_has_a_row_for_each_turn_and_tensorboard_shows_it_as_it_is() -> None:
    table, logger = TrajectoryTable(best=1, worst=0, random=0, max_characters=9), TextLogger()
    poor = trajectory(0, turn("no", "again", goal=0.25))
    rich = trajectory(1, turn("**look**\n<b>", "at this", goal=0.5), turn("yes", goal=0.75, shorter=2.0))
    broken = trajectory(2, turn("!", goal=99.0), failure="out of order")
    table.on_selection(6, [poor, rich, broken], [[-1.0], [1.5, 2.5], [0.0]])
    trainer = SimpleNamespace(is_global_zero=True, loggers=[logger], global_step=12)
    for _ in range(2):
        table.on_train_batch_start(trainer, None, None, 0)  # type: ignore[arg-type]
    ((name, text, step),) = logger.texts
    assert (name, step) == ("trajectories", 12)
    first, second = text.split("\n\n---\n\n")
    assert first.splitlines() == [
        "    iteration: 6",
        "    pick: best",
        "    task: task-a",
        "    sample: 1",
        "    turn: 0",
        "    response: **look**",
        "     ...",
        "    observation: at this",
        "    reward_goal: 0.5",
        "    reward_shorter: None",
        "    advantage: 1.5",
        "    ended: max_turns",
    ]
    assert "    advantage: 2.5\n" in second


def test_no_trajectory_is_picked_twice_and_what_is_picked_at_random_hangs_on_the_iteration_alone() -> None:
    table = TrajectoryTable(best=2, worst=2, random=3)
    played = [trajectory(i, turn("", goal=float(reward))) for i, reward in enumerate([3, 1, 4, 1, 5, 9, 2, 6])]
    picks = table._picks(7, played)
    assert {name: [i for i, pick in picks.items() if pick == name] for name in ("best", "worst")} == {
        "best": [5, 7],
        "worst": [3, 1],
    }
    assert len(picks) == 7
    assert picks == table._picks(7, played)
    assert len({tuple(table._picks(iteration, played)) for iteration in range(9)}) > 1
    assert len(table._picks(7, played[:3])) == 3


def test_without_a_logger_for_tables_there_is_no_table() -> None:
    trainer = SimpleNamespace(loggers=[CSVLogger(".")])
    with pytest.raises(ConfigError, match=r"trainer\.logger=CSVLogger takes no table .* add a WandbLogger"):
        TrajectoryTable().setup(trainer, None, "fit")  # type: ignore[arg-type]


# ---- pass@k


@pytest.mark.parametrize("ks", [[], [0, 1], [1, 5]])
def test_a_k_without_attempts_is_refused(ks: list[int]) -> None:
    from lit_stepwise.algo import GroupRelative
    from lit_stepwise.rollout import RolloutCallback
    from lit_stepwise.testing import Countdown, ScriptedEngine

    rollout = RolloutCallback(ScriptedEngine(lambda request: []), Countdown(), GroupRelative(), samples_per_task=4)
    with pytest.raises(ConfigError, match=r"PassAtK ks=.* with rollout\.samples_per_task=4"):
        PassAtK(ks).setup(SimpleNamespace(callbacks=[rollout]), None, "fit")  # type: ignore[arg-type]


# ---- the printer


def test_what_a_terminal_would_obey_is_shown_by_its_code() -> None:
    assert printable("a\x1b[2Jb\r\x00\u202ec\x9b é 東\ud800") == r"a\x1b[2Jb\r\x00\u202ec\x9b é 東\ud800"


def test_lines_stay_lines_and_long_ones_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    printer = SamplePrinter(every_n_iterations=3, max_characters=8)
    said = trajectory(0, turn("one\n\x1b]0;two three", "seen", goal=0.5))
    for iteration in (3, 4):
        printer.on_selection(iteration, [said], [[-0.25]])
    assert capsys.readouterr().out.splitlines() == [
        "",
        "iteration 3, task-a: reward 0.50",
        "  1 model  one",
        r"           \x1b]0; ...",
        "    world  seen",
        "    reward 0.50, advantage -0.25",
        "  ended: max_turns",
    ]


# ---- guards


def trainer_with(optimizer: Any = None, **metrics: float) -> Any:
    values = {f"train/{name}": torch.tensor(value) for name, value in metrics.items()}
    return SimpleNamespace(
        callback_metrics=values, global_step=3, should_stop=False, optimizers=[optimizer] if optimizer else []
    )


MODULE: Any = SimpleNamespace(log=lambda *given, **settings: None)


def stops(callback: Any, **metrics: float) -> bool:
    trainer = trainer_with(**metrics)
    callback.on_train_batch_end(trainer, MODULE, None, None, 0)
    return bool(trainer.should_stop)


def test_the_gap_has_to_be_over_its_limit_step_after_step_and_what_is_no_number_is() -> None:
    guard = LogprobGapGuard(max_gap=0.25, patience=2)
    assert [stops(guard, logprob_gap=gap) for gap in (0.5, 0.25, 0.5)] == [False] * 3
    assert not stops(guard)  # a step without a token says nothing
    resumed = LogprobGapGuard(max_gap=0.25, patience=2)
    resumed.load_state_dict(guard.state_dict())
    with pytest.warns(UserWarning, match=r"train/logprob_gap=nan at step 3 is above max_gap=0\.25 for 2 steps; stopp"):
        assert stops(resumed, logprob_gap=math.nan)


def test_the_guard_lowers_what_each_step_moves_and_stops_when_that_did_not_help() -> None:
    weight = torch.nn.Parameter(torch.tensor([10.0]))
    optimizer = torch.optim.SGD([weight], lr=4.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.5)
    guard = LogprobGapGuard(max_gap=0.1, action="lower_lr", factor=0.25, max_lowerings=2)
    trainer = trainer_with(optimizer, logprob_gap=0.2)
    guard.on_train_start(trainer, MODULE)
    moved = []
    for _ in range(3):
        before = weight.item()
        weight.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        moved.append(before - weight.item())
        with pytest.warns(UserWarning, match="the learning rate is 0|stopping"):
            guard.on_train_batch_end(trainer, MODULE, None, None, 0)
    # scheduled 4, 4 and 2, times 1, 1/4 and 1/16
    assert moved == [4.0, 1.0, 0.125]
    assert optimizer.param_groups[0]["lr"] == 2.0
    assert trainer.should_stop
    resumed = LogprobGapGuard(action="lower_lr", factor=0.25)
    resumed.load_state_dict(guard.state_dict())
    assert resumed.lr_factor == 0.0625


def test_a_factor_that_lowers_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="factor=1"):
        LogprobGapGuard(factor=1)


def test_kl_over_its_bound_step_after_step_ends_the_run() -> None:
    stop = KLEarlyStop(max_kl=0.5, patience=2)
    assert [stops(stop, rollout_kl=kl, kl=9.0) for kl in (0.75, 0.25, 0.75)] == [False] * 3
    resumed = KLEarlyStop(max_kl=0.5, patience=2)
    resumed.load_state_dict(stop.state_dict())
    with pytest.warns(UserWarning, match=r"train/rollout_kl=0\.7500 at step 3 is above max_kl=0\.5 for 2 steps; stop"):
        assert stops(resumed, rollout_kl=0.75)


def test_kl_to_a_reference_needs_one(countdown: dict[str, Any], main: Any) -> None:
    stop = {"class_path": "callbacks.kl_early_stop.KLEarlyStop", "init_args": {"metric": "train/kl"}}
    countdown["trainer"]["callbacks"].append(stop)
    code, stderr = main("fit", countdown)
    assert code == 1
    assert "error: KLEarlyStop metric=train/kl is not logged while model.kl.coefficient is 0" in stderr


def test_a_guard_ends_a_run_before_its_time(countdown: dict[str, Any], main: Any, tmp_path: Path) -> None:
    guard = "--trainer.callbacks+=callbacks.logprob_gap_guard.LogprobGapGuard"
    with pytest.warns(UserWarning, match=r"at step 2 is above max_gap=-1\.0 for 2 steps; stopping"):
        code, stderr = main("fit", countdown, guard, "--trainer.callbacks.max_gap=-1", "--trainer.callbacks.patience=2")
    assert code == 0, stderr
    (path,) = tmp_path.glob("runs/version_0/checkpoints/last.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 2
