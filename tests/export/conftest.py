"""Runs as ``lit-stepwise fit`` leaves them, without one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from lit_stepwise import cli
from lit_stepwise.testing import save_tiny_model
from lit_stepwise.training import Lora, StepwiseModule

METRICS = """step,val/accuracy,val/reward,rollout/accuracy,rollout/reward,train/loss
0,0.25,,,,
0,,,0.4375,0.5625,
0,,,,,0.1
2,0.375,0.625,,,
6,0.5,0.75,,,
7,0.875,0.9375,,,
"""


@dataclass
class Run:
    """A policy that has been trained, and the folder of its run."""

    module: StepwiseModule
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.module.weights()}


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Of a model, with weights that are nowhere those of its folder, and a checkpoint of Lightning's Trainer."""

    def make(model_path: Path, lora: Lora | None = None, seed: int = 3) -> Run:
        module = StepwiseModule(str(model_path), lora=lora)
        module.configure_model()
        draw = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=draw) / 10
        folder = tmp_path_factory.mktemp("runs") / "tiny" / "version_0"
        run = Run(module, folder)
        save_checkpoint(module, run.checkpoint)
        config = {
            "seed_everything": 7,
            "trainer": {"default_root_dir": "/somewhere/private"},
            "model": {"model_path": str(model_path), "lora": asdict(lora) if lora else None, "entropy_bonus": 0.125},
            "data": {"tasks_per_iteration": 5},
            "rollout": {"samples_per_task": 3, "engine": {"init_args": {"urls": ["http://secret:8000"]}}},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "metrics.csv").write_text(METRICS)
        return run

    return make


def save_checkpoint(module: StepwiseModule, path: Path, step: int = 6) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, which other tests see
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        trainer.strategy.connect(module)
        trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = step
        trainer.save_checkpoint(path)


@pytest.fixture(scope="session")
def tied_run(tiny_model: Path, make_run: Callable[..., Run]) -> Run:
    return make_run(tiny_model)


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 with biases and a head of its own, whose folder says bfloat16 as a folder of 2024 does."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = save_tiny_model(tmp_path_factory.mktemp("qwen2"))
    sizes = {"hidden_size": 128, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 267}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    config = Qwen2Config(**sizes, **heads, bos_token_id=None, eos_token_id=266, initializer_range=0.1)
    torch.manual_seed(1)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    text = (folder / "config.json").read_text()
    assert '"dtype": "float32"' in text
    (folder / "config.json").write_text(text.replace('"dtype": "float32"', '"torch_dtype": "bfloat16"'))
    return folder


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the command in this process: gives (exit code, what it said)."""

    def run(*words: Any) -> tuple[int, str]:
        code = cli.main(["export", *map(str, words)])
        said = capfd.readouterr()
        return code, said.out if code == 0 else said.err

    return run
