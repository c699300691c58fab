"""Which language models answer with log-probabilities."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_stepwise.errors import ConfigError
from lit_stepwise.training.policy_model import PolicyModel

SHAPE = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def language_model(kind: str, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SHAPE, **settings))


@pytest.mark.parametrize(
    ("kind", "settings", "found"),
    [
        ("Gemma2", {"final_logit_softcapping": 30.0, "attn_logit_softcapping": None}, "final_logit_softcapping=30.0"),
        ("Cohere", {"logit_scale": 0.0625}, "logit_scale=0.0625"),
        ("Granite", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
    ],
)
@pytest.mark.parametrize("packing", ["tree", "none"])
def test_what_happens_to_logits_after_the_head_is_not_left_out(
    kind: str, settings: dict[str, Any], found: str, packing: Any
) -> None:
    with pytest.raises(ConfigError, match=f"has {found}, which the chunked head would leave out"):
        PolicyModel(language_model(kind, **settings), packing=packing)


def test_a_bias_of_the_head_is_not_left_out() -> None:
    model = language_model("Qwen3")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(20))
    with pytest.raises(ConfigError, match="has a bias of its output embedding"):
        PolicyModel(model)


def test_a_scale_of_one_changes_nothing() -> None:
    PolicyModel(language_model("Granite", logits_scaling=1.0))


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def of_another_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            without_a_tensor,
            r"lacks 1 tensors of the model, such as model\.layers\.1\.mlp\.up_proj\.weight, which would",
        ),
        (cut_short, "cannot be loaded: .*not fully covered"),
        (of_another_kind, "cannot be loaded: Unrecognized configuration class .*T5Config"),
        (lambda folder: (folder / "config.json").unlink(), "it has no config.json, so it is no Hugging Face model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded: .*no file named model.safetensors"),
    ],
    ids=["a tensor missing", "cut short", "another kind", "no config", "no weights"],
)
def test_a_folder_that_is_not_all_of_a_model_is_refused_by_its_name(
    spoil: Callable[[Path], None], said: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(tiny_model, folder)
    spoil(folder)
    with pytest.raises(ConfigError, match=f"model.model_path='{folder}' .*{said}"):
        PolicyModel.load(str(folder))


def test_pickled_weights_are_read_as_safetensors_are(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(PolicyModel.load(str(folder)).language_model.state_dict()[name], weights[name])
