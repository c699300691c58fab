"""The command ``lit-stepwise plan`` as a person meets it."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_stepwise import cli

ROOT = Path(__file__).parents[2]
RECIPES = {"qwen3": (8, "fsdp2"), "qwen2_5_coder": (8, "fsdp2"), "qwen3_0_6b_1gpu": (1, "one process")}
SMALL = {
    "model.max_tokens_per_micro_batch": 300,
    "rollout.limits.max_prompt_tokens": 50,
    "rollout.limits.max_context_tokens": 300,
    "rollout.limits.max_new_tokens": 40,
    "data.tasks_per_iteration": 8,
}
"""Budgets of a recipe that are planned in a moment."""


@pytest.fixture
def plan(tmp_path, monkeypatch, capfd):
    """Run it in this process: gives (exit code, stdout, stderr)."""

    def run_it(config: Path | dict[str, Any], *words: object, **settings: object) -> tuple[Any, str, str]:
        if isinstance(config, dict):
            path = tmp_path / "config.yaml"
            path.write_text(yaml.safe_dump(config))
            config = path
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of jsonargparse
        monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning logs to the stderr of an earlier test
        options = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["lit-stepwise", "plan", "--config", str(config), *map(str, words), *options])
        try:
            code: Any = cli.main()
        except SystemExit as ended:
            code = ended.code
        assert not torch.distributed.is_initialized()
        out, err = capfd.readouterr()
        return code, out, err

    return run_it


@pytest.fixture
def small_config(tmp_path):
    """The ``config.json`` of a Qwen3 of two layers, for recipes."""
    from transformers import Qwen3Config

    Qwen3Config(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, dtype="bfloat16",
    ).save_pretrained(tmp_path / "small")  # fmt: skip
    return tmp_path / "small/config.json"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_planned_for_its_machine_on_one_without_a_gpu(recipe, plan, small_config):
    num_devices, strategy = RECIPES[recipe]
    settings = SMALL | {"model_config": small_config}
    code, out, err = plan(ROOT / f"configs/{recipe}.yaml", "--json", **settings)
    assert code == 0, err
    found = json.loads(out)
    assert found["fits"] is True
    assert (found["machine"]["num_devices"], found["strategy"]) == (num_devices, strategy)
    assert found["machine"]["kind"] == "gpu"
    assert found["model"]["source"].endswith("config.json")
    assert "train" in found["tasks"]["source"]  # which file is not there
    samples = 8 if recipe == "qwen3_0_6b_1gpu" else 5
    assert found["expected"]["num_trajectories"] == 8 * samples
    assert found["schedule"]["num_iterations"] == {"qwen3": 306, "qwen2_5_coder": 77}.get(recipe, 200)
    assert found["seconds"]["total"] > found["seconds"]["play"] > 0


def test_a_person_sees_tables_assumptions_and_the_margin(countdown, plan):
    code, out, _ = plan(countdown, **{"rates.train_tflops": 0.01})
    assert code == 0
    for title in ("An iteration, over all ranks", "Memory of a rank, GiB", "Time at assumed rates, measured nowhere"):
        assert title in out
    rows = {cells[0].strip(): [each.strip() for each in cells[1:]] for line in out.splitlines()
            if len(cells := re.split("[│┃]", line)) > 1}  # fmt: skip
    assert rows["trajectories"] == ["8", "8"]  # 2 tasks, 4 attempts
    assert rows["turns"][1] == "24"  # of 3 turns
    assert rows["optimizer steps of the run"][0] == "6"  # 3 epochs of 2 mini-batches
    assert rows["training tasks"][0] == "5"
    assert "by the tokenizer" in out
    assert re.search(r"It fits, by this account: [\d.]+ GiB are left", out)


def test_processes_on_cpus_have_a_row_for_what_gloo_copies(countdown, plan):
    few = {"limits.max_prompt_tokens": 40, "limits.max_context_tokens": 60, "limits.max_new_tokens": 8}
    sharded = {"trainer.devices": 2, "trainer.strategy": "fsdp2", "model.max_tokens_per_micro_batch": 60}
    code, out, err = plan(countdown, **sharded, **{f"rollout.{name}": value for name, value in few.items()})
    assert code == 0, err
    assert re.search(r"copies that gloo makes of them, at the peak +│ +0\.\d*[1-9]\d* │ +0.00", out), out
    assert "gloo" not in plan(countdown)[1]


def test_ranks_that_compute_layers_together_have_one_share_of_the_samples(countdown, plan):
    countdown["trainer"] |= {"devices": 2, "strategy": {"class_path": "FSDP2Strategy"}}
    countdown["data"]["tasks_per_iteration"] = 64
    found = []
    for size in (1, 2):
        countdown["trainer"]["strategy"]["init_args"] = {"tensor_parallel_size": size}
        code, out, err = plan(countdown, "--json", **{"model.max_tokens_per_micro_batch": 200})
        assert code == 0, err
        found.append(json.loads(out)["expected"]["micro_batches"])
    assert found == [4, 7]  # of 7, one rank has four
    countdown["trainer"]["strategy"]["init_args"] = {"tensor_parallel_size": 3}
    code, _, err = plan(countdown)
    assert (code, err.splitlines()[-1]) == (
        1, "error: trainer.strategy.init_args.tensor_parallel_size=3 does not divide trainer.devices=2; use 1 or 2",
    )  # fmt: skip


def test_words_of_the_command_line_are_those_of_fit(countdown, plan):
    words = {"rollout.samples_per_task": 6, "trainer.max_epochs": 7, "data.passes": 3}
    code, out, _ = plan(countdown, "--json", **words)
    found = json.loads(out)
    assert code == 0
    assert found["expected"]["num_trajectories"] == 12
    assert (found["schedule"]["num_iterations"], found["schedule"]["num_steps"]) == (7, 7 * 2 * 3)
    code, _, err = plan(countdown, **{"rollout.sample_per_task": 6})
    assert (code, "did you mean rollout.samples_per_task?" in err) == (2, True)
    code, _, err = plan(countdown, **{"assume.turn": 6})
    assert (code, "did you mean assume.turns?" in err) == (2, True)


def test_prompts_that_are_too_long_are_dropped_with_a_count(countdown, plan):
    countdown["data"]["train_files"] = "12"
    longest = json.loads(plan(countdown, "--json")[1])["tasks"]["longest"]
    code, out, _ = plan(countdown, "--json", **{"rollout.limits.max_prompt_tokens": longest - 1})
    found = json.loads(out)["tasks"]
    assert code == 0
    assert (found["num_tasks"], found["num_dropped"], found["is_assumed"]) == (12, 3, False)  # goals of two digits


def test_without_a_tokenizer_characters_are_counted(countdown, plan, small_config):
    countdown["model"]["model_path"] = "nobody/nowhere"
    code, out, _ = plan(countdown, "--json", model_config=small_config, **{"assume.chars_per_token": 2.0})
    found = json.loads(out)["tasks"]
    assert code == 0
    assert found["prompt_tokens"] == round(len("count down to 1") / 2) + 6
    assert "assumed 2.0 characters a token" in found["source"]


def test_a_model_that_nobody_knows_needs_its_configuration(countdown, plan):
    code, _, err = plan(countdown, **{"model.model_path": "nobody/nowhere"})
    assert code == 1
    assert "error: model.model_path='nobody/nowhere' has no configuration on this machine" in err
    assert "--model_config FILE.json" in err


GPU = {
    "trainer.accelerator": "gpu", "assume.overhead_gib": 0, "assume.engine_overhead_gib": 0,
    "assume.engine_asleep_gib": 0, "rollout.engine": "VLLMEngine", "rollout.engine.dtype": "float32",
    "rollout.engine.gpu_memory_utilization": 0.2,
}  # fmt: skip
LONG = {
    "model.max_tokens_per_micro_batch": 4096, "rollout.limits.max_context_tokens": 1500,
    "rollout.limits.max_new_tokens": 400,
}  # fmt: skip
TIGHT = {
    "activations": (
        LONG | {"gpu_memory_gib": 0.05},
        r"an optimizer step needs .* of the 0.\d GiB of a rank; use model.activation_checkpointing=true",
    ),
    "a budget": (
        LONG | {"gpu_memory_gib": 0.03, "model.activation_checkpointing": "true"},
        r"use model.max_tokens_per_micro_batch=(2048|3072), which by plan needs",
    ),
    "weights": (
        {"gpu_memory_gib": 0.0035, "trainer.devices": 2, "model.activation_checkpointing": "true",
         "model.max_tokens_per_micro_batch": 200, "model.logits_chunk_tokens": 16},
        r"use trainer.strategy=fsdp2",
    ),
    "the engine's share": (
        {"gpu_memory_gib": 0.1, "rollout.engine.gpu_memory_utilization": 0.99, "model.max_tokens_per_micro_batch": 200},
        r"gpu_memory_utilization=0.99: play needs .*; use 0.9\d",
    ),
    "too little of a cache": (
        {"gpu_memory_gib": 0.2, "rollout.engine.gpu_memory_utilization": 0.003},
        r"gpu_memory_utilization=0.003 leaves a cache for \d\d tokens, .*max_context_tokens=200; use 0.01",
    ),
    "positions": (
        {"rollout.limits.max_context_tokens": 5000},
        r"max_context_tokens=5000 is more than the 2048 tokens .*; use 2048 or fewer",
    ),
    "heads": (
        {"rollout.engine.tensor_parallel_size": 8, "trainer.devices": 8},
        "tensor_parallel_size=8 does not divide the 4 attention heads",
    ),
    "ranks": (
        {"rollout.engine.tensor_parallel_size": 2, "trainer.devices": 3},
        "tensor_parallel_size=2 does not divide the 3 ranks",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), TIGHT.values(), ids=TIGHT)
def test_what_does_not_fit_is_one_line_with_the_setting_that_would(settings, message, countdown, plan):
    code, _, err = plan(countdown, **GPU | settings)
    assert code == 1
    (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(message, said), said
