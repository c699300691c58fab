"""What the model card tells."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_stepwise.export.base import Base
from lit_stepwise.export.card import Provenance, model_card


@pytest.fixture
def card(tied_run: Any, export: Any, tmp_path: Path) -> str:
    """Of a run of a base model with a licence."""
    base = tmp_path / "base"
    shutil.copytree(tied_run.module.model_path, base)
    (base / "README.md").write_text("---\nlicense: mit\nlicense_link: http://a/b\nbase_model: x/y\n---\n# Base\n")
    (base / "LICENSE").write_text("do as you like")
    export(tied_run.checkpoint, tmp_path / "out", "--model_path", base)
    assert (tmp_path / "out" / "LICENSE").read_text() == "do as you like"
    return (tmp_path / "out" / "README.md").read_text()


def test_the_head_is_what_the_hub_reads(card: str) -> None:
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "license": "mit",
        "license_link": "http://a/b",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["reinforcement-learning", "lit-stepwise"],
    }


def test_it_says_what_was_measured_last_but_nothing_of_later_weights(card: str, tmp_path: Path) -> None:
    assert f"Weights of `{tmp_path}/base` after 6 optimizer steps of" in card
    rows = re.findall(r"^\| `(.*?)` \| .* \| ([\d.]+) \| (\d+) \|$", card, re.MULTILINE)
    assert rows == [
        ("val/accuracy", "0.5", "6"),
        ("val/reward", "0.75", "6"),
        ("rollout/accuracy", "0.4375", "0"),
        ("rollout/reward", "0.5625", "0"),
    ]


def test_it_says_what_was_learnt_from_what_but_nothing_of_machines(card: str) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    told = yaml.safe_load(block)
    assert set(told) == {"seed_everything", "model", "data", "rollout"}
    assert told["model"]["entropy_bonus"] == 0.125
    assert told["rollout"] == {"samples_per_task": 3}
    assert "secret" not in card
    assert "private" not in card


def test_its_lines_load_the_model(card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, Any] = {}
    exec(block, found)
    assert found["model"].num_parameters() > 0
    assert found["tokenizer"].chat_template
    assert "\n    vllm serve out\n" in card


def test_a_base_model_of_the_hub_is_linked(tiny_model: Path) -> None:
    card = model_card("out", Base("Qwen/Qwen3-4B", tiny_model), 17, "bfloat16", Provenance(1, {}, {}))
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["base_model"], head["library_name"], "license" in head) == ("Qwen/Qwen3-4B", "peft", False)
    assert "`Qwen/Qwen3-4B` after 1 optimizer step of" in card
    assert "--max-lora-rank 32 " in card


def test_the_files_of_the_run_may_lie_beside_the_checkpoint_and_a_kill_may_have_cut_the_last_line_of_one(
    tied_run: Any, export: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tied_run.folder, run)
    with (run / "metrics.csv").open("a") as file:
        file.write("5,0.9\nsix,0.125\n5,.\n4")
    checkpoint = shutil.move(run / "checkpoints" / "last.ckpt", run / "best.ckpt")
    assert export(checkpoint, tmp_path / "out")[0] == 0
    assert "| fraction of validation tasks solved | 0.9 | 5 |" in (tmp_path / "out" / "README.md").read_text()
