"""The gallery through the console script, named by class_path from another working directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

GALLERY = Path(__file__).parent.parent.parent / "callbacks"


@pytest.fixture
def gallery(tmp_path: Path) -> None:
    """A user's working directory with a copy of the gallery."""
    shutil.copytree(GALLERY, tmp_path / "callbacks", ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.usefixtures("gallery")
def test_the_printer_shows_model_and_world_in_the_iterations_asked_for(countdown: dict[str, Any], run: Any) -> None:
    printer = {"class_path": "callbacks.sample_printer.SamplePrinter", "init_args": {"every_n_iterations": 2}}
    countdown["trainer"]["callbacks"].append(printer)
    done = run("fit", countdown)
    assert done.returncode == 0, done.stderr
    assert [line.split(",")[0] for line in done.stdout.splitlines() if line.startswith("iteration")] == [
        "iteration 0",
        "iteration 2",
    ]
    assert "world  8 is too long" in done.stdout


@pytest.mark.usefixtures("gallery")
def test_the_guard_ends_a_run_whose_gap_is_over_its_limit_and_lets_others_go_on(
    countdown: dict[str, Any], run: Any
) -> None:
    guard = "--trainer.callbacks+=callbacks.logprob_gap_guard.LogprobGapGuard"
    stopped = run("fit", countdown, guard, "--trainer.callbacks.max_gap=-1", "--trainer.callbacks.patience=2")
    assert "is above max_gap=-1.0 for 2 steps; stopping" in stopped.stderr
    assert "2 steps in" in stopped.stdout
    untouched = run("fit", countdown, guard, "--trainer.callbacks.max_gap=1")
    assert "6 steps in" in untouched.stdout
