"""The pages for large machines, with a small model and few tasks in the place of theirs, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = {"qwen3": 2, "qwen2_5_coder": 2, "qwen3_0_6b_1gpu": 1}
STAND_INS = {
    "model.model_path": ROOT / "models/tiny-sql",
    "data.source": "DemoTasks",
    "data.source.database_root": "null",
    "data.train_files": "data/demo/train.jsonl",
    "data.val_files": "data/demo/val.jsonl",
    "data.tasks_per_iteration": 2,
    "data.max_val_tasks": 2,
    "rollout.engine": "TransformersEngine",
    "rollout.samples_per_task": 3,
    "rollout.limits.max_prompt_tokens": 2048,
    "rollout.limits.max_context_tokens": 4096,
    "rollout.limits.max_new_tokens": 16,
    "rollout.limits.max_turns": 2,
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_from_the_first_evaluation_to_the_last_checkpoint(recipe: str, run: Any, tmp_path: Path) -> None:
    num_devices = RECIPES[recipe]
    logger = ["--trainer.logger.offline", "true", "--trainer.logger.save_dir", "logs"] if num_devices > 1 else []
    overrides = STAND_INS | {"trainer.devices": num_devices, "trainer.default_root_dir": "out"}
    words = [str(word) for name, value in overrides.items() for word in (f"--{name}", value)]
    done = run("fit", None, "--config", str(ROOT / f"configs/{recipe}.yaml"), *words, *logger)
    assert done.returncode == 0, done.stderr
    assert "1 steps in" in done.stdout
    assert "saved=" in done.stderr
    saved = [path.name for path in tmp_path.rglob("*.ckpt")]
    assert "last.ckpt" in saved or recipe == "qwen2_5_coder"  # that one saves every 60 steps
