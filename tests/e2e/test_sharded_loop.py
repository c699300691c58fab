"""configs/tiny.yaml on two processes that share the model: it plays, learns and logs what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reading import differing, metrics, played

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.slow


def test_a_sharded_run_is_that_of_one_process(run: Any, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    config["model"] |= {"model_path": str(ROOT / "models" / "tiny-sql"), "activation_checkpointing": True}
    config["model"]["max_tokens_per_micro_batch"] = 2048
    config["rollout"]["engine"] = {"class_path": "lit_stepwise.engines.TransformersEngine"}
    config["rollout"]["samples_per_task"] = 4
    config["data"] |= {"tasks_per_iteration": 6, "mini_batches": 2, "max_val_tasks": 8}
    config["trainer"] |= {"max_epochs": 3, "enable_progress_bar": False}
    two = {"class_path": "lit_stepwise.training.FSDP2Strategy", "init_args": {"save_distributed_checkpoint": True}}
    together = {**two, "init_args": {"tensor_parallel_size": 2}}
    spread = {"two": {"devices": 2, "strategy": two}, "together": {"devices": 2, "strategy": together}}
    for name, trainer in {"one": {}, **spread}.items():
        done = run("fit", {**config, "trainer": {**config["trainer"], **trainer, "default_root_dir": name}})
        assert done.returncode == 0, done.stderr
    alone = tmp_path / "one/version_0"
    assert len(played(alone)) > 100
    assert len(metrics(alone)) == 6
    for name in spread:
        sharded = tmp_path / name / "version_0"
        assert played(alone) == played(sharded)
        assert differing(alone, sharded) == {}
        saved = sharded / "checkpoints" / "last.ckpt"
        assert sorted(path.suffix for path in saved.iterdir() if path.suffix)[:2] == [".distcp", ".distcp"]
        assert torch.load(saved / "meta.pt", weights_only=True)["global_step"] == 6
