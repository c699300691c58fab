"""Fixtures that several rooms use."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_stepwise import cli
from lit_stepwise.testing import save_tiny_model

ROOT = Path(__file__).parent.parent

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of two layers with a byte tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def countdown(tiny_model: Path) -> dict[str, Any]:
    """A whole configuration of the Countdown game; two optimizer steps an iteration."""
    checkpoint = {"every_n_train_steps": 1, "save_last": True, "save_top_k": 1}
    return {
        "model": {
            "model_path": str(tiny_model),
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {
            "source": {"class_path": "lit_stepwise.testing.CountdownTasks"},
            "train_files": "5",
            "val_files": "3",
            "test_files": "2",
            "tasks_per_iteration": 2,
            "mini_batches": 2,
        },
        "rollout": {
            "engine": {"class_path": "lit_stepwise.engines.TransformersEngine"},
            "environment": {"class_path": "lit_stepwise.testing.Countdown"},
            "advantage": {"class_path": "lit_stepwise.algo.TurnReturn"},
            "samples_per_task": 4,
            "deterministic": True,
            "limits": {"max_prompt_tokens": 100, "max_context_tokens": 200, "max_new_tokens": 8, "max_turns": 3},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 3,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": -1,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "default_root_dir": "runs",
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint}],
        },
    }


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """The same in this process, which saves the imports: gives (exit code, stderr)."""

    def run_it(command: str, config: dict[str, Any], *words: str) -> tuple[Any, str]:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of jsonargparse
        monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning logs to the stderr of an earlier test
        monkeypatch.setattr(sys, "argv", ["lit-stepwise", command, "--config", str(path), *words])
        try:
            code: Any = cli.main()
        except SystemExit as ended:
            code = ended.code
        return code, capfd.readouterr().err

    return run_it


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the console script in ``tmp_path``; a dict becomes ``--config``."""

    def run_it(command: str, config: dict[str, Any] | None = None, *words: str, **kwargs: Any) -> Any:
        arguments = [command]
        if config is not None:
            path = tmp_path / "config.yaml"
            path.write_text(yaml.safe_dump(config))
            arguments += ["--config", str(path)]
        script = Path(sys.executable).with_name("lit-stepwise")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [str(script), *arguments, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            **kwargs,
        )

    return run_it
