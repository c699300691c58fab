"""configs/tiny.yaml itself, on real databases, with both engines."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_stepwise.store.read import open_run, rows_of
from lit_stepwise.testing import exact_logprobs

ROOT = Path(__file__).parent.parent.parent
QUESTIONS = ROOT.parent / "shared" / "data" / "text2sql" / "questions.jsonl"

pytestmark = pytest.mark.slow


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """The shipped page, run from another folder."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    config["model"]["model_path"] = str(ROOT / "models" / "tiny-sql")
    config["trainer"]["enable_progress_bar"] = False
    return config


def column(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_greedy_accuracy_rises_within_a_few_iterations(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    words = ("--rollout.engine", "TransformersEngine", "--trainer.max_epochs", "6")
    done = run("fit", tiny, *words)
    assert done.returncode == 0, done.stderr
    accuracy = column(tmp_path / "runs/tiny/version_0", "val/accuracy")
    assert accuracy[-1] > accuracy[0] + 0.25, accuracy
    assert column(tmp_path / "runs/tiny/version_0", "rollout/failed") == [0.0] * 6


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_after_each_update_vllm_speaks_with_the_trainers_weights(
    tiny: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    # a learning rate at which weights of one update before would be far off
    words = ("--rollout.engine", "VLLMEngine", "--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "2")
    done = run("fit", tiny, *words, "--model.optimizer.lr", "0.003")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/tiny/version_0"
    assert max(column(folder, "train/logprob_gap")) < 1e-3
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny-sql", dtype=torch.float32)
    model.load_state_dict(
        {name.removeprefix("policy.language_model."): value for name, value in checkpoint["state_dict"].items()}
    )
    gaps, same = [], []
    query = "select * from turns where phase = 'evaluate-step000002' and group_id < 40"
    for turn in rows_of(open_run(folder), query):
        logprobs = exact_logprobs(model, turn["prompt_ids"], turn["response_ids"])
        same += [logprobs.argmax(-1).tolist() == turn["response_ids"]]
        chosen = logprobs.gather(-1, torch.tensor(turn["response_ids"])[:, None])[:, 0]
        gaps += (chosen - torch.tensor(turn["rollout_logprobs"])).abs().tolist()
    assert all(same)
    assert len(same) >= 40
    assert sum(gaps) / len(gaps) < 1e-3


def test_the_automatic_engine_says_in_one_line_which_it_took(tiny: dict[str, Any], run: Any) -> None:
    done = run("validate", tiny, "--data.max_val_tasks", "4")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("engine: ")]
    assert ("vllm" in line.lower()) == (find_spec("vllm") is not None), line


@pytest.mark.skipif(not QUESTIONS.exists(), reason="needs the real questions beside the project")
def test_real_questions_on_real_databases_play_and_train(tiny: dict[str, Any], run: Any, tmp_path: Path) -> None:
    words = ("--trainer.max_epochs", "3", "--data.tasks_per_iteration", "4", "--rollout.samples_per_task", "2")
    only = ("--trainer.limit_val_batches", "0", "--rollout.engine", "TransformersEngine")
    done = run("fit", tiny, *words, *only, "--data.train_files", str(QUESTIONS))
    assert done.returncode == 0, done.stderr
    assert column(tmp_path / "runs/tiny/version_0", "rollout/failed") == [0.0] * 3
