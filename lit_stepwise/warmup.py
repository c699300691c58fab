"""A model that knows the protocol of text-to-SQL and little else, made from nothing in minutes on a CPU.

    demo tasks --expert, through the environment--> traces --tokenizer--> token ids --supervised--> a small Qwen3

The expert guesses half of the spellings it should look up, so that reinforcement learning has something to find.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lit_stepwise.engines.transformers import TransformersEngine
from lit_stepwise.imitation import Trace, imitate
from lit_stepwise.rollout.agent_loop import AgentLoop, Attempt
from lit_stepwise.rollout.rendering import ChatRenderer
from lit_stepwise.text2sql.datasets.demo import DemoTasks, expert, write_tasks
from lit_stepwise.text2sql.datasets.tasks import JSONLTasks, SQLTask
from lit_stepwise.text2sql.environment import Text2SQL
from lit_stepwise.types import Limits, Sampling, Task

_TAGS = tuple(
    f"<{slash}{name}>" for name in ("think", "sql", "solution", "observation", "reminder") for slash in ("", "/")
)
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
    with closing(environment), tempfile.TemporaryDirectory() as scratch:
        file = write_tasks(Path(scratch), "warmup", max(num_tasks // 40, 1), num_tasks, seed)
        tasks = JSONLTasks().read(str(file))
        rng = random.Random(seed)
        traces = [_play_expert(environment, tasks, share, rng) for share in (0.0, mistake_share)]
        made = imitate(
            traces,
            output,
            tags=_TAGS,
            seed=seed,
            num_steps=num_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            vocabulary_size=vocabulary_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            rng=rng,
        )
        demo = DemoTasks(folder=f"{scratch}/demo")
        demo.prepare()
        accuracies = _accuracies(environment, output, demo.read(f"{demo.folder}/val.jsonl"))
    card = _model_card(settings, made.num_parameters, made.loss, accuracies)
    Path(output, "README.md").write_text(card, encoding="utf-8")
    print(
        f"{output}: loss {made.loss:.3f}, greedy accuracy {_share(accuracies.values())} before reinforcement learning"
    )


def _play_expert(environment: Text2SQL, tasks: Sequence[Task], mistake_share: float, rng: random.Random) -> list[Trace]:
    environment.prepare(tasks)

    def play(task: Task, seed: int) -> Trace:
        assert isinstance(task, SQLTask)
        rng = random.Random(seed)
        episode = environment.start(task, max_turns=rng.randint(4, 8))  # so that no number of turns left is a surprise
        return Trace.of(episode, expert(task, rng, mistake_share))

    seeds = [rng.getrandbits(32) for _ in tasks]
    with ThreadPoolExecutor(8) as pool:
        return list(tqdm(pool.map(play, tasks, seeds), desc="expert plays", total=len(tasks), delay=2, leave=False))


def _accuracies(environment: Text2SQL, model_path: str, tasks: Sequence[Task]) -> dict[int, tuple[int, int]]:
    """Solved and played tasks by number of look-ups, played greedily."""
    from transformers import AutoTokenizer

    engine = TransformersEngine(device="cpu")
    engine.start(model_path, _LIMITS.max_context_tokens)
    attempts = [Attempt(task, group, 0, (0,), Sampling(temperature=0.0)) for group, task in enumerate(tasks)]
    with closing(engine):
        engine.begin_phase(0)
        AgentLoop(
            engine=engine,
            environment=environment,
            renderer=ChatRenderer.of(AutoTokenizer.from_pretrained(model_path)),
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
