"""A store of a million turns: how long opening takes, and answering a filter.

python benchmarks/store_scale.py [--turns 1000000] [--folder /tmp/large] [--repeats 5]

Texts have the sizes of a run on real databases, drawn from a vocabulary; token ids are few, for none of the questions
reads them. Every question is asked in one process on a connection that is open, and as a command of its own, whose time
holds the start of Python and all imports.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from lit_stepwise.store.find import find_run
from lit_stepwise.store.read import open_run
from lit_stepwise.store.write import StoredPhase, TrajectoryStore
from lit_stepwise.types import Feedback, MiniBatch, StepSample, StopReason, Trajectory, Turn, VersionSpan

TASKS, ATTEMPTS, TURNS, TOKENS = 50, 8, 5, 4
WORDS = [f"{a}{b}{c}" for a in "bdfklmnprst" for b in "aeiou" for c in ("", "x", "ndo", "r_id", "ted", "lle")]
QUERIES = {
    "turns of large advantage": "select phase, group_id, sample, turn, response from turns where advantage > 1.9 "
    "order by advantage desc limit 20",
    "one trajectory": "select * from turns where phase = 'train-000100' and group_id = 7 and sample = 3 order by turn",
    "one task over time": "select iteration, avg(reward) from trajectories where task_id = 'task-17' group by 1",
    "engine and trainer apart": "select phase, turn, logprob_gap_max from turns order by logprob_gap_max desc limit 20",
    "a word of a response": "select count(*) from turns where response like '%tellerdex%'",
    "groups by kind": "select iteration, kind, count(*) from groups group by all",
}
COMMANDS = {
    "show": ["show"],
    "show --groups": ["show", "--groups"],
    "show --trajectory": ["show", "--trajectory", "train-000100/7/3"],
    "show --where 'advantage > 1.9'": ["show", "--where", "advantage > 1.9"],
    "show --task task-17": ["show", "--task", "task-17"],
    "show --sql": ["show", "--sql", "select stage, count(*) from turns group by all"],
    "report": ["report"],
}


def text(draw: random.Random, num_words: int) -> str:
    return " ".join(draw.choices(WORDS, k=num_words))


def trajectory(draw: random.Random, step: int, group: int, sample: int, prompt: list[int]) -> Trajectory:
    turns = []
    success = draw.random() < 0.4
    for turn in range(TURNS):
        last = turn == TURNS - 1
        sql = f"select {text(draw, 12)}"
        feedback = Feedback(
            "" if last else text(draw, 100), {"outcome": float(last and success), "format": 0.1}, done=last,
            success=last and success, details={"sql": sql, "status": draw.choice(["ok", "ok", "ok", "error"])},
        )  # fmt: skip
        logprobs = [-draw.random() for _ in range(TOKENS)]
        ids = [draw.randrange(150_000) for _ in range(TOKENS)]
        response = f"<think>{text(draw, 60)}</think><sql>{sql}</sql>"
        turns.append(
            Turn(
                prompt,
                ids,
                logprobs,
                [VersionSpan(step, TOKENS)],
                response,
                feedback,
                environment_seconds=draw.random(),
            )
        )
    return Trajectory(f"task-{group}", group, sample, turns, StopReason.DONE)


def rows(played: list[Trajectory]) -> list[StepSample]:
    mask, advantages = [True] * TOKENS, [0.0] * TOKENS
    return [
        StepSample(
            turn.prompt_ids,
            turn.response_ids,
            mask,
            turn.rollout_logprobs,
            advantages,
            reward=0.0,
            group=each.group,
            sample=each.sample,
            turn=index,
            policy_version=turn.policy_version,
        )
        for each in played
        for index, turn in enumerate(each.turns)
    ]


def make(folder: Path, num_turns: int) -> None:
    """As many iterations as it takes; each has an optimizer step, every tenth an evaluation."""
    draw = random.Random(0)
    prompts: dict[tuple[int, ...], str] = {}
    store = TrajectoryStore(folder / "trajectories", decode=lambda ids: prompts[tuple(ids)])
    for iteration in range(max(num_turns // (TASKS * ATTEMPTS * TURNS), 1)):
        prompts = {(iteration, group): text(draw, 600) for group in range(TASKS)}
        ids = list(map(list, prompts))
        played = [
            trajectory(draw, iteration, group, sample, ids[group])
            for group in range(TASKS)
            for sample in range(ATTEMPTS)
        ]
        advantages = [[draw.gauss(0, 1)] * TURNS for _ in played]
        store.write(StoredPhase("train", iteration, played, iteration, advantages, [""] * len(played)))
        samples = rows(played)
        learnt = {i: [x + draw.gauss(0, 0.01) for x in each.rollout_logprobs] for i, each in enumerate(samples)}
        store.learn(MiniBatch(samples, iteration, 0), learnt, iteration)
        if iteration % 10 == 0:
            store.write(StoredPhase("evaluate", iteration, [each for each in played if each.sample == 0]))


def seconds(ask: object, repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        ask()  # type: ignore[operator]
        found.append(time.perf_counter() - began)
    return found


def report(folder: Path, repeats: int) -> None:
    """Median and largest of every question."""
    run = find_run(folder)
    (num_turns,) = open_run(run).execute("select count(*) from turns").fetchone()
    files = len(run.files("play")) + len(run.files("learnt"))
    print(f"{num_turns:,} turns in {files:,} files, {run.num_bytes / 2**20:,.0f} MiB; {os.cpu_count()} CPUs")
    print(f"\n{'in one process':42}{'median s':>10}{'largest s':>11}")
    opened = seconds(lambda: open_run(folder), repeats)
    print(f"{'open_run':42}{median(opened):10.2f}{max(opened):11.2f}")
    connection = open_run(folder)
    for name, query in QUERIES.items():
        asked = seconds(lambda query=query: connection.execute(query).fetchall(), repeats)
        print(f"{name:42}{median(asked):10.2f}{max(asked):11.2f}")
    script = str(Path(sys.executable).with_name("lit-stepwise"))
    print(f"\n{'as a command':42}{'median s':>10}{'largest s':>11}")
    for name, (command, *words) in COMMANDS.items():
        call = [script, command, str(folder), *words]
        asked = seconds(lambda call=call: subprocess.run(call, check=True, capture_output=True), repeats)
        print(f"{name:42}{median(asked):10.2f}{max(asked):11.2f}")


def main() -> None:
    """Make the store, unless there is one, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "version_0"
        if not (folder / "trajectories").exists():
            make(folder, arguments.turns)
        report(folder, arguments.repeats)


if __name__ == "__main__":
    main()
