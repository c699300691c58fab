"""A small chat model made from nothing, which says what an expert would have said.

    tasks --expert, through the environment--> traces --tokenizer--> token ids --supervised--> a small Qwen3

It knows the protocol of an environment and its words, and is a start for reinforcement learning on a laptop.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lit_stepwise.interfaces import Episode
from lit_stepwise.rollout.rendering import ChatRenderer
from lit_stepwise.tiny_models import SPECIAL_TOKENS, chat_tokenizer, qwen3_config
from lit_stepwise.types import Message

_MAX_POSITIONS = 4096
_MICRO_BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Trace:
    """One attempt of an expert, as text."""

    messages: Sequence[Message]
    responses: Sequence[str]
    observations: Sequence[str]
    """What came back after each response; empty after the last."""

    @classmethod
    def of(cls, episode: Episode, responses: Iterable[str]) -> Trace:
        """Give ``responses`` one by one, and keep what comes back."""
        prompt, said = episode.prompt(), list(responses)
        return cls(prompt, said, [episode.step(response).observation for response in said])


class Imitated(NamedTuple):
    """What came of it."""

    loss: float
    """Nats per response token, mean over the last tenth of the steps."""
    num_parameters: int


def imitate(
    lessons: Sequence[Sequence[Trace]],
    output: str | Path,
    tags: Sequence[str] = (),
    seed: int = 0,
    num_steps: int = 200,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    vocabulary_size: int = 400,
    hidden_size: int = 64,
    num_layers: int = 3,
    rng: random.Random | None = None,
) -> Imitated:
    """Make a Qwen3 and its tokenizer of what is said in the traces, and save both to ``output``.

    Equal arguments give equal weights on one machine with one number of threads. Leaves torch's generator alone.

    Args:
        lessons: Traces, lesson by lesson; each gets an equal part of the steps.
        output: Folder to save to; made where it is missing.
        tags: Words of the protocol, e.g. ``<look>``, to be one token each.
        seed: Of the weights.
        num_steps: Optimizer steps.
        batch_size: Traces per optimizer step.
        learning_rate: At its peak; it rises over the first 5 percent of the steps and then falls to 0.
        vocabulary_size: Token ids, tags and control tokens included; more than 259 and the tags.
        hidden_size: Width of the model.
        num_layers: Depth of the model.
        rng: Draws the batches; by default one of ``seed``.
    """
    Path(output).mkdir(parents=True, exist_ok=True)  # no use in training what cannot be saved
    with _deterministic(seed):
        tokenizer = _make_tokenizer([trace for lesson in lessons for trace in lesson], tags, vocabulary_size)
        model = _make_model(tokenizer, hidden_size, num_layers)
        renderer = ChatRenderer.of(tokenizer)
        examples = [[_encode(renderer, trace) for trace in lesson] for lesson in lessons]
        loss = _train(model, examples, num_steps, batch_size, learning_rate, rng or random.Random(seed))
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)
    return Imitated(loss, model.num_parameters())


@dataclass(frozen=True, slots=True)
class _Example:
    """One attempt of an expert, as the model would have played it."""

    token_ids: list[int]
    """[S]"""
    is_response: list[bool]
    """[S] True on the tokens to learn."""


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Torch draws from ``seed`` and only computes what is the same every time; afterwards it is as it was."""
    before = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def _make_tokenizer(traces: Sequence[Trace], tags: Sequence[str], vocabulary_size: int) -> Any:
    """Byte-level BPE over what is said in the traces; numbers stay single digits, tags are one token each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(tags),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    header = "".join(f"{role}\n" for role in ("user", "assistant", "system"))
    tag = re.compile("|".join(map(re.escape, tags)) or r"(?!)")  # without tags nothing is one
    said = (
        tag.sub("", text)
        for trace in traces
        for text in (header, *(message.content for message in trace.messages), *trace.responses, *trace.observations)
    )
    tokenizer.train_from_iterator(said, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return chat_tokenizer(tokenizer, model_max_length=_MAX_POSITIONS)


def _make_model(tokenizer: Any, hidden_size: int, num_layers: int) -> Any:
    from transformers import GenerationConfig, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(qwen3_config(tokenizer, hidden_size, num_layers, _MAX_POSITIONS, tie_word_embeddings=True))
    ends = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ends)
    return model


def _encode(renderer: ChatRenderer, trace: Trace) -> _Example:
    prompt_ids = renderer.first_prompt(trace.messages)
    token_ids: list[int] = []
    is_response: list[bool] = []
    for response, observation in zip(trace.responses, trace.observations, strict=True):
        response_ids = renderer.tokenizer(response, add_special_tokens=False)["input_ids"]
        token_ids = [*prompt_ids, *response_ids]
        is_response += [False] * (len(prompt_ids) - len(is_response)) + [True] * len(response_ids)
        prompt_ids = renderer.append(prompt_ids, response_ids, observation)
    return _Example(token_ids, is_response)


def _train(
    model: Any,
    lessons: Sequence[Sequence[_Example]],
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    rng: random.Random,
) -> float:
    """Mean cross-entropy of response tokens, minimised; returns its mean over the last tenth of the steps."""
    optimizers = _make_optimizers(model, learning_rate)
    losses: list[float] = []
    model.train()
    with tqdm(range(num_steps), desc="warm-up") as bar:
        for step in bar:
            rise, fall = min(1.0, 20 * (step + 1) / num_steps), 0.5 * (1 + cos(pi * step / num_steps))
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = learning_rate * rise * fall
            examples = lessons[step * len(lessons) // num_steps]
            losses.append(_train_step(model, optimizers, rng.sample(examples, min(batch_size, len(examples)))))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    last = losses[-max(num_steps // 10, 1) :]
    return sum(last) / len(last)


def _make_optimizers(model: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between the layers, which halves the steps that AdamW needs; AdamW for the rest."""
    embeddings = model.get_input_embeddings().weight
    matrices = [weight for weight in model.parameters() if weight.dim() == 2 and weight is not embeddings]
    others = [weight for weight in model.parameters() if weight.dim() != 2 or weight is embeddings]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def _train_step(model: Any, optimizers: Sequence[torch.optim.Optimizer], batch: Sequence[_Example]) -> float:
    batch = sorted(batch, key=lambda example: len(example.token_ids))  # little padding in each part
    num_targets = sum(sum(example.is_response) for example in batch)
    total = 0.0
    model.zero_grad()
    for start in range(0, len(batch), _MICRO_BATCH_SIZE):
        loss = _loss(model, batch[start : start + _MICRO_BATCH_SIZE]) / num_targets
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return total


def _loss(model: Any, examples: Sequence[_Example]) -> Tensor:
    """Sum of the cross-entropy of every response token, of examples padded on the right."""
    token_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(each.token_ids) for each in examples], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.tensor(each.is_response) for each in examples], batch_first=True)
    states = model.model(input_ids=token_ids[:, :-1]).last_hidden_state[mask[:, 1:]]
    return cross_entropy(model.lm_head(states), token_ids[:, 1:][mask[:, 1:]], reduction="sum")
