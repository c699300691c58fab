"""The last lines of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.trainer.states import TrainerFn

from lit_stepwise.cli import COMMANDS
from lit_stepwise.training.clock import PhaseClock
from lit_stepwise.training.summary import RunSummary


def trainer(accuracy: float, step: int, sanity_checking: bool = False, fn: TrainerFn = TrainerFn.FITTING) -> Any:
    return SimpleNamespace(
        callback_metrics={"val/accuracy": accuracy},
        global_step=step,
        sanity_checking=sanity_checking,
        state=SimpleNamespace(fn=fn),
        log_dir="runs/version_3",
        ckpt_path=None,
        checkpoint_callback=SimpleNamespace(last_model_path=str(Path.cwd() / "runs/version_3/checkpoints/last.ckpt")),
    )


def spend(summary: RunSummary, **seconds: float) -> None:
    """Let phases pass on a clock that is set by hand."""
    now = [0.0]
    summary._clock = PhaseClock(lambda: now[0])
    for phase, taken in seconds.items():
        summary.on_phase(phase)
        now[0] += taken


def test_it_says_what_was_gained_where_the_time_went_and_where_the_files_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    summary = RunSummary()
    summary.on_validation_end(trainer(0.461, 0, sanity_checking=True), None)
    spend(summary, play=60.0, train=30.0, sync=0.3, evaluate=9.7)
    state = summary.state_dict()
    summary = RunSummary()  # the run is killed, and resumed
    summary.load_state_dict(state)
    summary.on_validation_end(trainer(0.9, 4, sanity_checking=True), None)
    spend(summary, train=20.0)
    summary.on_validation_end(trainer(0.969, 8), None)
    summary.on_validation_end(trainer(0.952, 12), None)
    summary.on_fit_end(trainer(0.952, 12), None)
    assert capsys.readouterr().out.splitlines() == [
        "accuracy  46.1% before, 95.2% after (+49.1 points), best 96.9% at step 8",
        "time      12 steps in 120 s: play 60.0 s (50%), train 50.0 s (42%), evaluate 9.7 s (8%)",
        "files     runs/version_3",
        "next      lit-stepwise show runs/version_3",
        "          lit-stepwise report runs/version_3",
        "          lit-stepwise export runs/version_3/checkpoints/last.ckpt model/",
    ]


def test_a_mere_validation_says_where_its_files_are(capsys: pytest.CaptureFixture[str]) -> None:
    RunSummary().on_validation_end(trainer(0.461, 0, fn=TrainerFn.VALIDATING), None)
    assert capsys.readouterr().out == "files     runs/version_3\n"


def test_without_a_validation_it_says_the_time_alone(capsys: pytest.CaptureFixture[str]) -> None:
    summary = RunSummary()
    spend(summary, train=5000.0)
    bare = trainer(0.5, 7)
    bare.checkpoint_callback = None
    summary.on_fit_end(bare, None)
    assert capsys.readouterr().out.splitlines() == [
        "time      7 steps in 1:23:20: train 5000.0 s (100%)",
        "files     runs/version_3",
        "next      lit-stepwise show runs/version_3",
        "          lit-stepwise report runs/version_3",
    ]


def test_the_commands_that_it_names_exist() -> None:
    assert {"show", "report", "export"} <= COMMANDS.keys()
