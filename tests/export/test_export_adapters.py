"""A low-rank adapter on its way out: in the weights, or alone for PEFT."""

from __future__ import annotations

import json
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_stepwise.testing import exact_logprobs
from lit_stepwise.training import Lora

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")
PROMPT, RESPONSE = [5, 6, 7, 31], [8, 9, 250]


@pytest.fixture(scope="module")
def run(qwen2: Path, make_run: Any) -> Any:
    return make_run(qwen2, Lora(rank=3, alpha=5, target_modules=["q_proj", "down_proj"]))


def logprobs_of(model: Any) -> torch.Tensor:
    return exact_logprobs(model.eval(), PROMPT, RESPONSE)[range(len(RESPONSE)), RESPONSE]


def test_the_adapter_is_merged_into_weights_that_any_loader_knows(
    run: Any, qwen2: Path, export: Any, tmp_path: Path
) -> None:
    assert export(run.checkpoint, tmp_path / "out", "--dtype", "float32")[0] == 0
    found, base = (load_file(each / "model.safetensors") for each in (tmp_path / "out", qwen2))
    assert set(found) == set(base)
    changed = {name for name in found if not torch.equal(found[name], base[name])}
    assert changed == {name for name in base if "q_proj.weight" in name or "down_proj.weight" in name}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logprobs_of(model), run.module.score([(PROMPT, RESPONSE)])[0][0], rtol=0, atol=1e-5)


def test_merged_weights_are_rounded_once_after_the_sum(run: Any, export: Any, tmp_path: Path) -> None:
    export(run.checkpoint, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in run.weights().items())


def test_the_adapter_alone_is_a_folder_that_peft_loads_from_anywhere(
    run: Any, qwen2: Path, export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(qwen2.parent)
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    config["model"]["model_path"] = qwen2.name  # as a run in that folder would say
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint = shutil.copy(run.checkpoint, tmp_path)
    assert export(checkpoint, tmp_path / "out", "--adapter", "separate", "--dtype", "float32")[0] == 0
    monkeypatch.chdir(tmp_path)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", *tokenizer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logprobs_of(model), run.module.score([(PROMPT, RESPONSE)])[0][0], rtol=0, atol=1e-5)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (3, 5, str(qwen2))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "A low-rank adapter (rank 3) for" in card
    assert f"vllm serve {qwen2.name} --enable-lora --max-lora-rank 8 --lora-modules out=out" in card


def test_the_adapter_alone_has_the_precision_of_the_base_model_too(run: Any, export: Any, tmp_path: Path) -> None:
    export(run.checkpoint, tmp_path / "out", "--adapter", "separate")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    expected = dict(run.module.adapter().weights)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in expected.items())


def test_an_adapter_without_its_settings_or_settings_without_an_adapter_are_refused(
    run: Any, tied_run: Any, qwen2: Path, export: Any, tmp_path: Path
) -> None:
    alone = tmp_path / "alone.ckpt"
    alone.symlink_to(run.checkpoint)
    code, said = export(alone, tmp_path / "out", "--model_path", qwen2)
    assert (code, "holds an adapter, and no config.yaml with its model.lora is beside it" in said) == (1, True)
    code, said = export(tied_run.checkpoint, tmp_path / "out", "--adapter", "separate")
    assert (code, "adapter=separate, but all weights were trained and there is no adapter; use" in said) == (1, True)
    assert not (tmp_path / "out").exists()
