"""Whole runs on engines that live elsewhere, or over several ranks."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]


def column(folder: Path, name: str) -> list[float]:
    (path,) = folder.glob("runs/*/metrics.csv")
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_a_server_plays_ahead_of_training_and_weights_reach_it(
    countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    countdown["rollout"]["engine"] = {"class_path": "lit_stepwise.engines.VLLMServerEngine"}
    countdown["rollout"] |= {
        "deterministic": False,
        "staleness": 1,
        "max_logprob_gap": 1e-4,
        "evaluation": {"samples_per_task": 4},
    }
    done = run("fit", countdown)
    assert done.returncode == 0, done.stderr
    assert len(column(tmp_path, "train/logprob_gap")) == 6
    assert column(tmp_path, "train/logprob_gap")[0] < 1e-5
    for k in (1, 2, 4):
        assert len(column(tmp_path, f"val/pass_at_{k}")) == 4  # before training, and after each iteration


def test_an_adapter_alone_is_trained_and_alone_reaches_vllm(
    countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    countdown["rollout"]["engine"] = {"class_path": "lit_stepwise.engines.VLLMEngine"}
    countdown["rollout"]["max_logprob_gap"] = 1e-4
    countdown["model"]["lora"] = {"rank": 4}
    countdown["model"]["optimizer"]["init_args"]["lr"] = 0.01  # or nobody would see an adapter that did not arrive
    done = run("fit", countdown, "--trainer.max_epochs", "3")
    assert done.returncode == 0, done.stderr
    gaps = column(tmp_path, "train/logprob_gap")
    assert max(gaps[::2]) < 1e-5 < 1e-2 < min(gaps[1::2])
