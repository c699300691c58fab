"""A chat model made of what experts said: what is learnt of a trace, and what is saved."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lit_stepwise import imitation as room
from lit_stepwise.imitation import Trace, imitate
from lit_stepwise.interfaces import Episode
from lit_stepwise.rollout.rendering import ChatRenderer
from lit_stepwise.types import Feedback, Message

TINY = {"num_steps": 3, "batch_size": 2, "vocabulary_size": 264, "hidden_size": 16, "num_layers": 1}
LESSONS = [
    [Trace([Message("user", "which way?")], ["<go>left</go>"], [""])],
    [Trace([Message("user", "which way?")], ["<go>right</go>", "<go>on</go>"], ["a wall", ""])],
]


class Echo(Episode):
    def prompt(self) -> Sequence[Message]:
        return [Message("user", "say something")]

    def step(self, response: str) -> Feedback:
        return Feedback(f"you said {response}" if response != "bye" else "", done=response == "bye")


def test_a_trace_keeps_what_was_said_and_what_came_back() -> None:
    trace = Trace.of(Echo(), (word for word in ("hello", "bye")))
    assert trace == Trace([Message("user", "say something")], ["hello", "bye"], ["you said hello", ""])


def test_what_is_saved_loads_and_has_a_token_for_each_tag(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = imitate(LESSONS, tmp_path / "new" / "model", tags=["<go>", "</go>"], **TINY)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new" / "model")
    assert made.num_parameters == model.num_parameters()
    assert model.config.vocab_size == len(tokenizer) <= 264
    assert len(tokenizer("<go></go>")["input_ids"]) == 2


def test_equal_arguments_give_equal_weights_and_torch_is_left_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(11)
        imitate(LESSONS, tmp_path / name, seed=seed, **TINY)
        assert torch.rand(1) == expected
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_the_lessons_are_taught_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    taught: list[str] = []
    monkeypatch.setattr(room, "_train_step", lambda model, optimizers, batch: taught.extend(batch) or 1.0)
    monkeypatch.setattr(room, "_make_optimizers", lambda model, learning_rate: [])
    room._train(torch.nn.Module(), [["a"], ["b"], ["c"]], 7, 32, 1e-3, random.Random(0))
    assert taught == ["a", "a", "a", "b", "b", "c", "c"]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(room, "_train", None)
    with pytest.raises(OSError, match="Not a directory"):
        imitate(LESSONS, os.fspath(tmp_path / "file" / "model"), **TINY)


def test_digits_stay_single_so_that_any_number_can_be_copied():
    tokenizer = room._make_tokenizer([Trace([Message("user", "above 1024 " * 99)], [], [])], [], 400)
    assert len(tokenizer("above")["input_ids"]) == 1
    assert len(tokenizer("1024")["input_ids"]) == 4


def test_a_trace_is_trained_on_responses_only_in_the_tokens_of_play():
    tokenizer = room._make_tokenizer([], ["<sql>", "</sql>", "<solution>", "</solution>"], 263)
    renderer = ChatRenderer.of(tokenizer)
    trace = Trace([Message("user", "How many?")], ["<sql>SELECT 1</sql>", "<solution>SELECT 2</solution>"], ["7", ""])
    example = room._encode(renderer, trace)
    assert tokenizer.decode(example.token_ids) == (
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
        "<sql>SELECT 1</sql><|im_end|>\n<|im_start|>user\n7<|im_end|>\n<|im_start|>assistant\n"
        "<solution>SELECT 2</solution>"
    )
    learned = [token for token, marked in zip(example.token_ids, example.is_response, strict=True) if marked]
    assert tokenizer.decode(learned) == "<sql>SELECT 1</sql><solution>SELECT 2</solution>"
    assert len(example.is_response) == len(example.token_ids)


def test_the_loss_is_that_of_the_response_tokens_whatever_the_padding():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(5)
    sizes = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=1, num_key_value_heads=1))
    short = room._Example([3, 1, 4, 1], [False, False, True, True])
    long = room._Example([5, 9, 2, 6, 5, 3, 5], [False, True, False, False, True, True, False])
    expected = 0.0
    for example in (short, long):
        logprobs = model(torch.tensor([example.token_ids])).logits[0].log_softmax(-1)
        for place, token in enumerate(example.token_ids):
            expected -= logprobs[place - 1, token].item() if example.is_response[place] else 0.0
    assert room._loss(model, [short, long]).item() == pytest.approx(expected, rel=1e-5)
