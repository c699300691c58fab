"""configs/tiny.yaml on two processes that share the model: it plays, learns and logs what one process does."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.slow


def metrics(folder: Path) -> dict[str, dict[str, float]]:
    """By step."""
    steps: dict[str, dict[str, float]] = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            steps.setdefault(row["step"], {}).update({name: float(value) for name, value in row.items() if value})
    return steps


def played(folder: Path) -> list[tuple[str, list[int], list[int]]]:
    """What the engine read and wrote in all of the run."""
    found = []
    for path in sorted((folder / "trajectories").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            turns = json.loads(line)["turns"]
            found += [(path.name, turn["prompt_ids"], turn["response_ids"]) for turn in turns]
    return sorted(found)


def test_a_sharded_run_is_that_of_one_process(run: Any, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    config["model"] |= {"model_path": str(ROOT / "models" / "tiny-sql"), "activation_checkpointing": True}
    config["model"]["max_tokens_per_micro_batch"] = 2048
    config["rollout"]["engine"] = {"class_path": "lit_stepwise.engines.TransformersEngine"}
    config["rollout"]["samples_per_task"] = 4
    config["data"] |= {"tasks_per_iteration": 6, "mini_batches": 2, "max_val_tasks": 8}
    config["trainer"] |= {"max_epochs": 3, "enable_progress_bar": False}
    two = {"class_path": "lit_stepwise.training.FSDP2Strategy", "init_args": {"save_distributed_checkpoint": True}}
    for name, trainer in {"one": {}, "two": {"devices": 2, "strategy": two}}.items():
        done = run("fit", {**config, "trainer": {**config["trainer"], **trainer, "default_root_dir": name}})
        assert done.returncode == 0, done.stderr
    alone, together = tmp_path / "one/version_0", tmp_path / "two/version_0"
    assert played(alone) == played(together)
    assert len(played(alone)) > 100
    expected, found = metrics(alone), metrics(together)
    assert list(found) == list(expected)
    compared = [
        (step, name)
        for step, values in expected.items()
        for name in values
        # each rank has a tree of its own, and a clock
        if name.split("/")[0] in ("train", "rollout", "val") or name in ("tokens/trained", "tokens/generated")
    ]
    assert len(compared) > 100
    for step, name in compared:
        assert found[step][name] == pytest.approx(expected[step][name], rel=1e-3, abs=1e-4), (step, name)
    saved = together / "checkpoints" / "last.ckpt"
    assert sorted(path.suffix for path in saved.iterdir() if path.suffix)[:2] == [".distcp", ".distcp"]
    assert torch.load(saved / "meta.pt", weights_only=True)["global_step"] == 6
