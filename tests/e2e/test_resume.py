"""Pull the plug, resume, and nothing is different."""

from __future__ import annotations

import csv
import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_stepwise.store.read import open_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
KILL = '''
import os, signal
from lightning.pytorch import Callback

class KillBefore(Callback):
    """kill -9 itself before the optimizer step that would follow ``step``."""
    def __init__(self, step: int) -> None:
        self.step = step
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
'''


def outcome(folder: Path) -> tuple[int, str, list[str]]:
    """(global_step, hash of all weights, rewards and losses of the last iteration) of the newest run."""
    newest = max(folder.glob("version_*"), key=lambda path: path.stat().st_mtime)
    checkpoint = torch.load(newest / "checkpoints" / "last.ckpt", weights_only=True)
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint["state_dict"].items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    with (newest / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = [row["rollout/reward"] or row["train/loss"] for row in rows if row["train/loss"]][-2:]
    return checkpoint["global_step"], digest.hexdigest(), values


def learnt(folder: Path) -> list[tuple[Any, ...]]:
    """What the newest run and those it went on from stored of training: each turn once."""
    columns = "iteration, group_id, sample, turn, response_ids, advantage, trained_at, trainer_logprobs"
    query = f"select {columns} from turns where stage = 'train' order by iteration, group_id, sample, turn"
    return open_run(folder).execute(query).fetchall()


def killed_before(step: int, config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with a callback that kills the run."""
    killer = {"class_path": "kill_before.KillBefore", "init_args": {"step": step}}
    return {**config, "trainer": {**config["trainer"], "callbacks": [*config["trainer"]["callbacks"], killer]}}


def check_that_a_killed_run_ends_like_one_left_alone(
    steps: tuple[int, ...], config: dict[str, Any], run: Any, folder: Path, *words: str
) -> None:
    (folder / "kill_before.py").write_text(KILL)
    config["trainer"]["default_root_dir"] = "runs"
    assert run("fit", config, *words, "--trainer.default_root_dir", "alone").returncode == 0
    for step in steps:
        assert run("fit", killed_before(step, config), *words, "--ckpt_path", "last").returncode == -9
    resumed = run("fit", config, *words, "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert outcome(folder / "runs") == outcome(folder / "alone")
    assert learnt(folder / "runs") == learnt(folder / "alone")
    assert outcome(folder / "runs")[0] == 6


WHEN = {
    "at an iteration boundary": (2,),
    "in the middle of an iteration": (3,),
    "at one boundary after the other": (2, 4),
}


@pytest.mark.parametrize("steps", WHEN.values(), ids=WHEN)
def test_a_run_killed_and_resumed_ends_like_one_that_was_left_alone(
    steps: tuple[int, ...], countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    check_that_a_killed_run_ends_like_one_left_alone(steps, countdown, run, tmp_path)


def test_resuming_a_run_that_has_ended_trains_nothing_more(countdown: dict[str, Any], run: Any, tmp_path: Path) -> None:
    for _ in range(3):
        assert run("fit", countdown, "--trainer.max_epochs", "2", "--ckpt_path", "last").returncode == 0
    ends = [
        torch.load(path, weights_only=True)["global_step"] for path in tmp_path.glob("runs/*/checkpoints/last.ckpt")
    ]
    assert set(ends) == {4}


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_tiny_run_on_vllm_and_sqlite_does_so_too(run: Any, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    config["model"]["model_path"] = str(ROOT / "models" / "tiny-sql")
    words = ("--rollout.engine", "VLLMEngine", "--rollout.samples_per_task", "4", "--data.tasks_per_iteration", "6")
    check_that_a_killed_run_ends_like_one_left_alone(
        (3,), config, run, tmp_path, *words, "--data.mini_batches", "2", "--trainer.max_epochs", "3"
    )


def test_asking_for_the_last_checkpoint_where_there_is_none_starts_afresh_and_says_so(
    countdown: dict[str, Any], run: Any
) -> None:
    done = run("fit", countdown, "--ckpt_path", "last", "--trainer.max_epochs", "1")
    assert done.returncode == 0
    assert "no checkpoint below runs, so this is a fresh start" in done.stderr
