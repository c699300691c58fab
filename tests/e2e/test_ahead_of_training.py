"""Runs in which play runs ahead of training."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from lit_stepwise.store.read import open_run, rows_of

pytestmark = pytest.mark.slow


def metrics(folder: Path) -> list[dict[str, float]]:
    """One row per optimizer step."""
    steps: dict[int, dict[str, float]] = {}
    (path,) = folder.glob("runs/*/metrics.csv")
    with path.open() as file:
        for row in csv.DictReader(file):
            steps.setdefault(int(row["step"]), {}).update({name: float(value) for name, value in row.items() if value})
    return [steps[step] for step in sorted(steps)]


def stored(folder: Path, iteration: int) -> list[dict[str, Any]]:
    return rows_of(open_run(folder / "runs"), "select * from turns where iteration = ?", iteration)


@pytest.mark.parametrize("staleness", [1, 2])
def test_every_iteration_is_trained_once_and_none_is_older_than_allowed(
    staleness: int, countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    countdown["rollout"] |= {"staleness": staleness, "deterministic": False}
    countdown["trainer"]["max_epochs"] = 5
    done = run("fit", countdown)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path)
    assert len(rows) >= 10
    for iteration in range(5):
        versions = [span["policy_version"] for turn in stored(tmp_path, iteration) for span in turn["versions"]]
        now = 2 * iteration  # two optimizer steps an iteration
        assert max(now - 2 * staleness, 0) <= min(versions) <= max(versions) <= now
    played = [row for row in rows if "rollout/stale_1" in row]
    assert len(played) == 5
    shares = [[row[f"rollout/stale_{age}"] for age in range(staleness + 1)] for row in played]
    assert all(sum(share) == pytest.approx(1) for share in shares)
    assert shares[0][0] == 1.0
    assert all(0 <= row["idle/trainer"] <= 1 and 0 <= row["idle/engine"] <= 1 for row in played[1:])
    assert "token_cap" in done.stderr  # rollout correction is on by default, and that is said


def test_a_resumed_run_goes_on_with_every_iteration_to_come(
    countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    countdown["rollout"] |= {"staleness": 1, "deterministic": False}
    assert run("fit", countdown, "--trainer.max_steps", "3").returncode == 0
    countdown["trainer"]["max_epochs"] = 4
    done = run("fit", countdown, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in tmp_path.glob("runs/version_1/trajectories/train-*.parquet"))
    assert files == ["train-000002.parquet", "train-000003.parquet"]  # the stored samples of iteration 1 were trained


def test_two_ranks_play_ahead_beside_each_others_training(countdown: dict[str, Any], run: Any, tmp_path: Path) -> None:
    countdown["rollout"] |= {"staleness": 2, "deterministic": False}
    countdown["trainer"] |= {"devices": 2, "strategy": "ddp", "max_epochs": 4}
    countdown["data"]["tasks_per_iteration"] = 4
    done = run("fit", countdown)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("runs/*/trajectories/train-*.parquet"))) == 4
    assert {(each["group_id"], each["sample"]) for each in stored(tmp_path, 3)} == {
        (group, sample) for group in range(4) for sample in range(4)
    }
