"""Killed from outside in one phase after the other, and resumed each time: benchmarks/kill_training.py, a short one."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kill_training import Kill, Run, config, differences, killed, uninterrupted

pytestmark = pytest.mark.slow

KILLS = [Kill(kind, "all", 1, 0.5) for kind in ("training", "saving", "evaluation", "play")]


def test_a_run_that_was_killed_in_every_phase_is_the_one_that_was_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    made = config(tiny_model, num_iterations=4, num_processes=1)
    alone, run = uninterrupted(Run(tmp_path / "alone", made)), Run(tmp_path / "killed", made)
    for kill in KILLS:
        assert killed(run, kill, alone.seconds) is not None
        assert differences(run, alone, whole=False) == []
    assert run.start().wait() == 0, run.log()
    assert differences(run, alone, whole=True) == []
    assert len(run.notes()) == 8
    assert len({name for _, name in run.metrics() if name.startswith("val/")}) > 5


LOOK = """
import shutil
from lightning.pytorch import Callback

class Look(Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        shutil.copy(trainer.log_dir + "/metrics.csv", f"at-{trainer.global_step}.csv")
"""


def test_metrics_of_a_step_are_on_the_disk_before_its_checkpoint(
    countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    countdown["trainer"] |= {"callbacks": [*countdown["trainer"]["callbacks"], {"class_path": "look.Look"}]}
    done = run("fit", countdown, "--trainer.max_epochs", "1")
    assert done.returncode == 0, done.stderr
    for step in (1, 2):
        with (tmp_path / f"at-{step}.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["train/loss"]]
        assert [row["step"] for row in rows] == [str(each) for each in range(step)]
