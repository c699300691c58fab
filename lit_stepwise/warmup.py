"""A model that knows the protocol of text-to-SQL and little else, made from nothing in minutes on a CPU.

    demo tasks --expert, through the environment--> traces --tokenizer--> token ids --supervised--> a small Qwen3

The expert guesses half of the spellings it should look up, so that reinforcement learning has something to find.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lit_stepwise.engines.transformers import TransformersEngine
from lit_stepwise.rollout.agent_loop import AgentLoop, Attempt
from lit_stepwise.rollout.rendering import ChatRenderer
from lit_stepwise.text2sql.datasets.demo import DemoTasks, expert, write_tasks
from lit_stepwise.text2sql.datasets.tasks import JSONLTasks, SQLTask
from lit_stepwise.text2sql.environment import Text2SQL
from lit_stepwise.tiny_models import SPECIAL_TOKENS, chat_tokenizer, qwen3_config
from lit_stepwise.types import Limits, Message, Sampling, Task

_TAGS = tuple(
    f"<{slash}{name}>" for name in ("think", "sql", "solution", "observation", "reminder") for slash in ("", "/")
)
_MAX_POSITIONS = 4096
_MICRO_BATCH_SIZE = 16
_LIMITS = Limits(max_prompt_tokens=256, max_context_tokens=1024, max_new_tokens=64, max_turns=5)


def warmup(
    output: str = "models/tiny-sql",
    seed: int = 0,
    num_steps: int = 800,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    num_tasks: int = 16000,
    mistake_share: float = 0.5,
    vocabulary_size: int = 1000,
    hidden_size: int = 128,
    num_layers: int = 5,
) -> None:
    """Make a small model that plays text-to-SQL by the protocol, from which reinforcement learning can start.

    Equal arguments give equal weights on one machine with one number of threads.

    Args:
        output: Folder to save model, tokenizer and model card to.
        seed: Of databases, traces and weights.
        num_steps: Optimizer steps, the first half on faultless traces.
        batch_size: Traces per optimizer step.
        learning_rate: At its peak; it rises over the first 5 percent of the steps and then falls to 0.
        num_tasks: Tasks that the expert plays, once without and once with mistakes; one database per 40.
        mistake_share: Share of the look-ups that the expert skips, to guess a spelling instead.
        vocabulary_size: Token ids, tags and control tokens included.
        hidden_size: Width of the model.
        num_layers: Depth of the model.
    """
    settings = dict(locals())
    Path(output).mkdir(parents=True, exist_ok=True)  # no use in training what cannot be saved
    environment = Text2SQL(instructions="", schema="compact")
    with closing(environment), tempfile.TemporaryDirectory() as scratch, _deterministic(seed):
        file = write_tasks(Path(scratch), "warmup", max(num_tasks // 40, 1), num_tasks, seed)
        tasks = JSONLTasks().read(str(file))
        rng = random.Random(seed)
        traces = [_play_expert(environment, tasks, share, rng) for share in (0.0, mistake_share)]
        tokenizer = _make_tokenizer([*traces[0], *traces[1]], vocabulary_size)
        model = _make_model(tokenizer, hidden_size, num_layers)
        renderer = ChatRenderer.of(tokenizer)
        lessons = [[_encode(renderer, trace) for trace in each] for each in traces]
        loss = _train(model, lessons, num_steps, batch_size, learning_rate, rng)
        tokenizer.save_pretrained(output)
        model.save_pretrained(output)
        demo = DemoTasks(folder=f"{scratch}/demo")
        demo.prepare()
        accuracies = _accuracies(environment, output, renderer, demo.read(f"{demo.folder}/val.jsonl"))
    card = _model_card(settings, model.num_parameters(), loss, accuracies)
    Path(output, "README.md").write_text(card, encoding="utf-8")
    print(f"{output}: loss {loss:.3f}, greedy accuracy {_share(accuracies.values())} before reinforcement learning")


@dataclass(frozen=True, slots=True)
class _Trace:
    """One attempt of the expert, as text."""

    messages: Sequence[Message]
    responses: Sequence[str]
    observations: Sequence[str]
    """What came back after each response; empty after the last."""


@dataclass(frozen=True, slots=True)
class _Example:
    """One attempt of the expert, as the model would have played it."""

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


def _play_expert(
    environment: Text2SQL, tasks: Sequence[Task], mistake_share: float, rng: random.Random
) -> list[_Trace]:
    environment.prepare(tasks)

    def play(task: Task, seed: int) -> _Trace:
        assert isinstance(task, SQLTask)
        rng = random.Random(seed)
        episode = environment.start(task, max_turns=rng.randint(4, 8))  # so that no number of turns left is a surprise
        responses = list(expert(task, rng, mistake_share))
        return _Trace(episode.prompt(), responses, [episode.step(response).observation for response in responses])

    seeds = [rng.getrandbits(32) for _ in tasks]
    with ThreadPoolExecutor(8) as pool:
        return list(tqdm(pool.map(play, tasks, seeds), desc="expert plays", total=len(tasks), delay=2, leave=False))


def _make_tokenizer(traces: Sequence[_Trace], vocabulary_size: int) -> Any:
    """Byte-level BPE over what is said in the traces; numbers stay single digits, tags are one token each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(_TAGS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    header = "".join(f"{role}\n" for role in ("user", "assistant", "system"))
    tags = re.compile("|".join(map(re.escape, _TAGS)))
    said = (
        tags.sub("", text)
        for trace in traces
        for text in (header, *(message.content for message in trace.messages), *trace.responses, *trace.observations)
    )
    tokenizer.train_from_iterator(said, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in _TAGS])
    return chat_tokenizer(tokenizer, model_max_length=_MAX_POSITIONS)


def _make_model(tokenizer: Any, hidden_size: int, num_layers: int) -> Any:
    from transformers import GenerationConfig, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(qwen3_config(tokenizer, hidden_size, num_layers, _MAX_POSITIONS, tie_word_embeddings=True))
    ends = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ends)
    return model


def _encode(renderer: ChatRenderer, trace: _Trace) -> _Example:
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


def _accuracies(
    environment: Text2SQL, model_path: str, renderer: ChatRenderer, tasks: Sequence[Task]
) -> dict[int, tuple[int, int]]:
    """Solved and played tasks by number of look-ups, played greedily."""
    engine = TransformersEngine(device="cpu")
    engine.start(model_path, _LIMITS.max_context_tokens)
    attempts = [Attempt(task, group, 0, (0,), Sampling(temperature=0.0)) for group, task in enumerate(tasks)]
    with closing(engine):
        engine.begin_phase(0)
        AgentLoop(
            engine=engine,
            environment=environment,
            renderer=renderer,
            limits=_LIMITS,
            deterministic=True,
            num_threads=2,
        ).play(attempts)
    solved: Counter[int] = Counter()
    played: Counter[int] = Counter()
    for attempt in attempts:
        assert isinstance(attempt.task, SQLTask)
        grade = attempt.task.num_lookups or 0
        played[grade] += 1
        solved[grade] += attempt.trajectory().success
    return {grade: (solved[grade], played[grade]) for grade in sorted(played)}


def _share(accuracies: Iterable[tuple[int, int]]) -> str:
    solved, played = map(sum, zip(*accuracies, strict=True))
    return f"{100 * solved / played:.1f} % ({solved} of {played})"


def _model_card(
    settings: Mapping[str, Any], num_parameters: int, loss: float, accuracies: Mapping[int, tuple[int, int]]
) -> str:
    command = " ".join(["lit-stepwise warmup", *(f"--{name} {value}" for name, value in settings.items())])
    grades = "\n".join(f"| {grade} | {_share([each])} |" for grade, each in accuracies.items())
    return _CARD.format(
        command=command,
        millions=f"{num_parameters / 1e6:.2f}",
        loss=f"{loss:.3f}",
        grades=grades,
        overall=_share(accuracies.values()),
        **settings,
    )


_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [text-to-sql, reinforcement-learning, lit-stepwise]
---

# {output}

A Qwen3 of {millions} million parameters that plays text-to-SQL by the protocol of lit-stepwise, and is made to be
improved by reinforcement learning on a laptop. It is no use for anything else.

## How it was made

    {command}

From random weights, by supervised learning alone, with Muon: {num_steps} steps of {batch_size} traces, response tokens
only, final loss {loss} nats per token. The traces are those of a scripted expert on {num_tasks} generated demo tasks,
whose databases are none of those of the train, val and test tasks. In the first half of the steps the expert looks up
every spelling; in the second half it skips a share of about {mistake_share} of the look-ups and guesses. Equal
arguments give equal weights on one machine with one number of threads. No data but that of the generator was used.

## What it can do

Share of the 128 val tasks of the demo (`DemoTasks`, seed 0) that it solves, played greedily, before any reinforcement
learning:

| look-ups needed | solved |
|---|---|
{grades}
| all | {overall} |

It follows the protocol, and it can copy a spelling that it has seen; but it often guesses where it should look, as the
expert did. Learning to look is what is left to reinforcement learning.

## Limits

- It knows the eight tables, their columns and the words of the demo, and no others. Other databases, other wordings and
  other SQL than `SELECT <aggregate> FROM <table> WHERE <conditions>` are beyond it.
- It was trained without a system message (`instructions: ""`), on compact schemas, with 4 to 8 turns.
- Accuracies are of one seed on 128 tasks: their standard error is about 4 points.
"""
