"""Writes train.jsonl, val.jsonl and a model to start from, which knows the protocol but looks too seldom.

python prepare.py [SEED]
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from environment import CardIndex, CardTask, CardTasks

from lit_stepwise.imitation import Trace, imitate
from lit_stepwise.types import Task

NAMES = ["ann", "bea", "cal", "dan", "eva", "fay", "gus", "ida", "jon", "kim", "leo", "mia", "ned", "pam", "ray", "sue"]
CITIES = ["rome", "oslo", "lima", "cairo", "paris", "quito", "delhi", "seoul", "tunis", "berne", "miami", "dakar"]


def write_tasks(file: str, num_tasks: int, seed: int) -> None:
    """Each with five people of its own; a question leads over none, one or two bosses to a city."""
    rng = random.Random(f"{file} {seed}")
    lines = []
    for number in range(num_tasks):
        people, cities, num_bosses = rng.sample(NAMES, 5), rng.sample(CITIES, 5), number % 3
        bosses = people[1:] + people[:1]
        cards = zip(people, cities, bosses, strict=True)
        task = CardTask(
            task_id=f"{Path(file).stem}-{number}",
            question=f"Where does {'the boss of ' * num_bosses}{people[0]} work?",
            answer=cities[num_bosses],
            cards={name: f"{name} works in {city} for {boss}" for name, city, boss in cards},
        )
        lines.append(json.dumps({name: getattr(task, name) for name in ("task_id", "question", "answer", "cards")}))
    Path(file).write_text("\n".join(lines) + "\n")


def expert(task: Task, rng: random.Random, mistake_share: float) -> Iterator[str]:
    """Look at every card on the way; but before each look, with this probability, guess instead."""
    assert isinstance(task, CardTask)
    name = task.question.split()[-2]
    for _ in range(task.question.count("boss") + 1):
        if rng.random() < mistake_share:
            yield f"<answer>{rng.choice(CITIES)}</answer>"
            return
        yield f"<look>{name}</look>"
        city, name = task.cards[name].split()[3::2]
    yield f"<answer>{city}</answer>"


def main(seed: int = 0) -> None:
    """Tasks first, then a model that has seen an expert without and one with mistakes."""
    for file, num_tasks in (("warmup.jsonl", 2000), ("train.jsonl", 500), ("val.jsonl", 128)):
        write_tasks(file, num_tasks, seed)
    environment, rng = CardIndex(), random.Random(seed)
    lessons = [
        [Trace.of(environment.start(task, 5), expert(task, rng, share)) for task in CardTasks().read("warmup.jsonl")]
        for share in (0.0, 0.5)
    ]
    tags = ["<look>", "</look>", "<answer>", "</answer>"]
    made = imitate(lessons, "model", tags, seed=seed, num_steps=150)
    print(f"model: {made.num_parameters} weights, loss {made.loss:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
