"""The pages for large machines with the page for a dry run on top: a small model and few tasks, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = ROOT / "configs/overlays"
RECIPES = {"qwen3": 2, "qwen2_5_coder": 2, "qwen3_0_6b_1gpu": 1}
"""Processes of each."""
IN_FULL = ["--trainer.fast_dev_run", "false", "--trainer.max_epochs", "1"]
ON_DUCKDB = {
    "data.source.system": "duckdb", "data.source.folder": "data/demo-duckdb",
    "data.train_files": "data/demo-duckdb/train.jsonl", "data.val_files": "data/demo-duckdb/val.jsonl",
}  # fmt: skip


def fit(run: Any, model: Path, recipe: str, overlays: list[str], *words: str) -> Any:
    pages = [ROOT / f"configs/{recipe}.yaml", *(OVERLAYS / f"{name}.yaml" for name in [*overlays, "dry_run"])]
    configs = [word for page in pages for word in ("--config", str(page))]
    done = run("fit", None, *configs, "--model.model_path", str(model), *words)
    assert done.returncode == 0, done.stderr
    assert "1 steps in" in done.stdout
    assert "step 1/1  reward" in done.stdout
    return done


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one, of the class of Qwen2.5, with the tokenizer of the tiny Qwen3."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen2")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/tiny-sql")
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**tokens, **shape, intermediate_size=48, max_position_embeddings=4096))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_from_the_first_evaluation_to_the_last_checkpoint(
    recipe: str, run: Any, qwen2: Path, tmp_path: Path
) -> None:
    num_devices = RECIPES[recipe]
    logger = ["--trainer.logger.offline", "true", "--trainer.logger.save_dir", "logs"] if num_devices > 1 else []
    model = qwen2 if recipe == "qwen2_5_coder" else ROOT / "models/tiny-sql"
    fit(run, model, recipe, [], *IN_FULL, "--trainer.devices", str(num_devices), *logger)
    saved = [path.name for path in tmp_path.rglob("*.ckpt")]
    assert "last.ckpt" in saved or recipe == "qwen2_5_coder"  # that one saves every 60 steps


@pytest.mark.slow
def test_a_recipe_runs_on_duckdb(run: Any, tmp_path: Path) -> None:
    words = [word for name, value in ON_DUCKDB.items() for word in (f"--{name}", value)]
    logger = ["--trainer.logger.offline", "true", "--trainer.logger.save_dir", "logs"]
    alone = ["--trainer.devices", "1", "--trainer.strategy", "auto"]
    fit(run, ROOT / "models/tiny-sql", "qwen3", ["duckdb"], *IN_FULL, *words, *alone, *logger)
    assert list(tmp_path.glob("data/demo-duckdb/databases/*.duckdb"))
    config = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())
    environment = config["rollout"]["environment"]["init_args"]
    assert environment["executor"]["class_path"] == "lit_stepwise.text2sql.DuckDBExecutor"
    assert (environment["style"], environment["match"]) == ("skyrl", "set")  # which the recipe says


@pytest.mark.slow
def test_a_dry_run_of_a_recipe_leaves_nothing_to_go_on_from(run: Any, tmp_path: Path) -> None:
    """In particular no ``last.ckpt``, which ``--ckpt_path last`` would take."""
    fit(run, ROOT / "models/tiny-sql", "qwen3_0_6b_1gpu", [], "--trainer.devices", "1", "--data.mini_batches", "2")
    left = {path.relative_to(tmp_path).parts[:3] for path in tmp_path.rglob("*") if path.is_file()}
    assert {parts for parts in left if parts[0] != "data"} == {("runs", "dry_run", "trajectories")}
