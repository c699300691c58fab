"""A miniature warm-up: what it saves, and that it saves the same twice."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from lit_stepwise import warmup as room
from lit_stepwise.types import Limits
from lit_stepwise.warmup import warmup

MINIATURE = {
    "seed": 3,
    "num_steps": 4,
    "batch_size": 6,
    "num_tasks": 40,
    "hidden_size": 32,
    "num_layers": 1,
    "vocabulary_size": 400,
}


@pytest.fixture(scope="module", autouse=True)
def _play_briefly():
    with pytest.MonkeyPatch.context() as patch:  # a model that knows nothing plays every turn to its end
        patch.setattr(room, "_LIMITS", Limits(max_prompt_tokens=256, max_new_tokens=2, max_turns=1))
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("models") / "mini"
    warmup(str(output), **MINIATURE)
    return output


@pytest.fixture(scope="module")
def tokenizer(saved):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(saved)


def test_equal_arguments_give_equal_files(saved, tmp_path):
    torch.manual_seed(99)  # which is not to matter
    warmup(str(tmp_path / "mini"), **MINIATURE)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "mini" / name).read_bytes() == (saved / name).read_bytes()


def test_another_seed_gives_other_weights(saved, tmp_path):
    warmup(str(tmp_path / "mini"), **MINIATURE | {"seed": 4})
    assert (tmp_path / "mini" / "model.safetensors").read_bytes() != (saved / "model.safetensors").read_bytes()


def test_torch_is_left_as_it_was(tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    warmup(str(tmp_path / "mini"), **MINIATURE)
    assert torch.rand(1) == expected
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_is_saved_loads_without_this_package(saved):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.dtype is torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == 400
    assert model.generation_config.eos_token_id == model.config.eos_token_id


def test_tags_are_one_token_each_and_control_tokens_are_special(tokenizer):
    for tag in ("<think>", "</think>", "<sql>", "</sql>", "<solution>", "</solution>", "<observation>", "</reminder>"):
        (token,) = tokenizer(tag)["input_ids"]
        assert tokenizer.decode([token], skip_special_tokens=True) == tag
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.decode(tokenizer("<|im_start|>")["input_ids"], skip_special_tokens=True) == ""


def test_any_text_survives_the_tokenizer(tokenizer):
    text = "SELECT 'é  ü' FROM \"x\"\n\n<b> 1024 , do n't ."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_model_card_says_how_it_was_made_and_what_it_can_do(saved):
    card = (saved / "README.md").read_text()
    assert f"lit-stepwise warmup --output {saved} --seed 3 --num_steps 4 --batch_size 6" in card
    assert re.search(r"\| all \| \d+\.\d % \(\d+ of 128\) \|", card)
    assert [re.search(rf"\| {grade} \| .* of (\d+)\)", card)[1] for grade in range(4)] == ["28", "46", "36", "18"]
    assert "{" not in card


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_played(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(room, "_play_expert", None)
    with pytest.raises(OSError, match="Not a directory"):
        warmup(os.fspath(tmp_path / "file" / "model"), **MINIATURE)


def test_the_loss_falls(tmp_path, capsys):
    losses = []
    for num_steps in (1, 12):
        warmup(str(tmp_path / "mini"), **MINIATURE | {"num_steps": num_steps, "learning_rate": 0.01})
        losses.append(float(re.search(r"loss (\d+\.\d+)", capsys.readouterr().out)[1]))
    assert losses[1] < losses[0] - 1
