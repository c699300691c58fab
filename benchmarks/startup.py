"""Seconds of the ordinary things around play and training, and how they grow with samples, tasks and ranks.

    OMP_NUM_THREADS=1 python benchmarks/startup.py [--parts start model samples tasks ranks] [--rounds 3]

Seconds are of the process (user and system), on one thread, the median of the rounds: other work on the machine does
not count. ``growth`` is how much longer the last size takes than the first, over how much larger it is: 1.0 grows with
the size; with its square it would be 4.0 where the last is four times the first. Samples are those of
``benchmarks/workloads.py``, shape A with thoughts stripped, a quarter as long.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from workloads import workload

from lit_stepwise.algo import GiGPO, GroupRelative, StateValueGAE, TurnReturn
from lit_stepwise.algo.filters import Filters
from lit_stepwise.algo.flops import Flops
from lit_stepwise.algo.microbatches import plan_micro_batches
from lit_stepwise.algo.packing import collate
from lit_stepwise.engines import TransformersEngine
from lit_stepwise.rollout.samples import assign_credit, step_samples
from lit_stepwise.store.settings import Storage
from lit_stepwise.store.write import StoredPhase, TrajectoryStore
from lit_stepwise.testing import save_tiny_model
from lit_stepwise.text2sql import JSONLTasks
from lit_stepwise.training import TaskDataModule
from lit_stepwise.training.experience import Experience, pack, unpack
from lit_stepwise.training.loading import load_sharded
from lit_stepwise.training.lora import weights_of
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.types import Feedback, StepSample, StopReason, Trajectory, Turn, VersionSpan

ROOT = Path(__file__).parent.parent
QWEN3_4B = Flops(per_token=7.27e9, per_pair=4 * 36 * 32 * 128, per_target=2 * 2560 * 151_936)
Work = Callable[[], Any]


def seconds_of(make: Callable[[], Work], rounds: int) -> float:
    """Of what ``make`` gives, each time anew."""
    found = []
    for _ in range(rounds):
        work = make()
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return median(found)


def seconds_of_command(words: Sequence[str], rounds: int) -> float:
    """Of a child process and its own."""
    found = []
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return median(found)


# ---- what grows with the samples of an iteration


def samples_of(size: int) -> list[StepSample]:
    """The first so many, whole groups but for the last."""
    made = workload("A", "strip", groups=size // 12, seed=5, shrink=4)
    assert len(made) >= size
    return made[:size]


def trajectories_of(samples: Sequence[StepSample]) -> list[Trajectory]:
    """What was played for them."""
    turns: dict[tuple[int, int], list[Turn]] = {}
    for number, sample in enumerate(samples):
        feedback = Feedback("seen", {"outcome": float(number % 3)}, state_key=f"state {number % 7}")
        spans = [VersionSpan(0, len(sample.response_ids))]
        turn = Turn(sample.prompt_ids, sample.response_ids, sample.rollout_logprobs, spans, "said", feedback)
        turns.setdefault((sample.group, sample.sample), []).append(turn)
    done = StopReason.DONE
    return [Trajectory(f"task {group}", group, sample, each, done) for (group, sample), each in turns.items()]


def mini_batches_of(samples: list[StepSample]) -> None:
    experience = Experience(mini_batches=4, passes=1)
    experience.ensure(lambda iteration: samples)
    for _ in range(len(experience)):
        experience.current()
        experience.advance()


def per_samples(size: int, folder: Path) -> dict[str, Work]:
    """What is done with so many of an iteration."""
    samples = samples_of(size)
    played = trajectories_of(samples)
    advantages = assign_credit(played, GroupRelative())
    filters = Filters()
    store = TrajectoryStore(folder, Storage(), lambda ids: "")
    few = samples[: size // 16]
    works: dict[str, Work] = {
        f"credit: {type(each).__name__}": lambda each=each: assign_credit(played, each)
        for each in (GroupRelative(), TurnReturn(), GiGPO(), StateValueGAE())
    }
    return works | {
        "filters": lambda: filters.selection(played, advantages, filters.kept_groups(played)),
        "rows: step": lambda: step_samples(played, advantages, "step"),
        "rows: trajectory": lambda: step_samples(played, advantages, "trajectory"),
        "mini-batches": lambda: mini_batches_of(samples),
        "plan, 8 ranks, 32768 tokens": lambda: plan_micro_batches(samples, 32768, QWEN3_4B, "tree", 8),
        "plan, packing none": lambda: plan_micro_batches(samples, 32768, QWEN3_4B, "none", 8),
        "tensors of a sixteenth of them": lambda: collate(few, [1.0] * len(few), "tree"),
        "to a checkpoint and back": lambda: unpack(pack(samples)),
        "store": lambda: store.write(StoredPhase("train", 0, played, 0, advantages)),
    }


def per_ranks(ranks: int) -> dict[str, Work]:
    """What every rank does for all of so many."""
    samples = samples_of(2000)
    shares = [trajectories_of(samples)[rank::ranks] for rank in range(ranks)]
    return {
        "plan of 2000 samples, 8192 tokens": lambda: plan_micro_batches(samples, 8192, QWEN3_4B, "tree", ranks),
        "order of all ranks' trajectories": lambda: sorted(
            (each for part in shares for each in part), key=lambda each: (each.group, each.sample)
        ),
    }


def per_tasks(size: int, folder: Path) -> dict[str, Work]:
    """What is done with so many of a file."""
    file = folder / f"{size}.jsonl"
    (folder / "databases").mkdir(exist_ok=True)
    (folder / "databases" / "shop.sqlite").touch()
    with file.open("w") as lines:
        for number in range(size):
            record = {"id": f"t{number}", "db_id": "shop", "question": f"How many {number}?", "gold_sql": "SELECT 1"}
            lines.write(json.dumps(record) + "\n")
    data = TaskDataModule(JSONLTasks(), train_files=str(file), tasks_per_iteration=64)
    data.setup("fit")
    return {
        "read a file": lambda: data.read("train"),
        "keep what can be played": lambda: data.keep(data.tasks),
        "tasks of 20 iterations": lambda: [data.tasks_for(iteration) for iteration in range(20)],
        "first further task of 20 iterations": lambda: [next(data.further_tasks(i)) for i in range(20)],
    }


def table(title: str, sizes: Sequence[int], works: Callable[[int], dict[str, Work]], rounds: int) -> None:
    """A line for each work."""
    print(f"\n{title:44}" + "".join(f"{size:>10}" for size in sizes) + f"{'growth':>10}", flush=True)
    found: dict[str, list[float]] = {}
    for size in sizes:
        for name, work in works(size).items():
            found.setdefault(name, []).append(seconds_of(lambda work=work: work, rounds))
    for name, seconds in found.items():
        growth = f"{seconds[-1] / seconds[0] / (sizes[-1] / sizes[0]):>10.2f}" if seconds[0] >= 1e-3 else " too short"
        print(f"{name:44}" + "".join(f"{each:>10.4f}" for each in seconds) + growth, flush=True)


# ---- a start, and a model


def line(name: str, seconds: float) -> None:
    print(f"{name:64}{seconds:>10.3f}", flush=True)


def starts(rounds: int) -> None:
    python, script = sys.executable, str(Path(sys.executable).with_name("lit-stepwise"))
    fit = [script, "fit", "--config", "configs/tiny.yaml", "--print_config"]
    for name, words in {
        "python, which imports nothing": [python, "-c", ""],
        "import lit_stepwise": [python, "-c", "import lit_stepwise"],
        "lit-stepwise --help": [script, "--help"],
        "import torch": [python, "-c", "import torch"],
        "import lightning.pytorch.cli": [python, "-c", "import lightning.pytorch.cli"],
        "import lit_stepwise.commands": [python, "-c", "import lit_stepwise.commands"],
        "lit-stepwise fit --config configs/tiny.yaml --print_config": fit,
        "lit-stepwise fit --help": [script, "fit", "--help"],
    }.items():
        line(name, seconds_of_command(words, rounds))


def models(rounds: int, folder: Path) -> None:
    """Of one that is large enough to see, with four byte a weight."""
    path = str(save_tiny_model(folder / "model", hidden_size=1024, num_layers=8))
    num_weights = sum(each.numel() for each in PolicyModel.load(path).parameters())
    print(f"\na random Qwen3 of {num_weights / 1e6:.0f} million weights, seconds")
    # its memory is that of the file, which is read when it is used
    line("load", seconds_of(lambda: lambda: PolicyModel.load(path), rounds))
    line("make on the meta device", seconds_of(lambda: lambda: PolicyModel.load(path, on_meta=True), rounds))
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy="fsdp2", logger=False, enable_checkpointing=False)
    strategy: Any = trainer.strategy
    strategy.connect(pl.LightningModule())
    strategy.setup_environment()

    def shards() -> PolicyModel:
        return load_sharded(path, lambda on_meta: PolicyModel.load(path, on_meta=on_meta), lambda model: None, strategy)

    line("make on the meta device and read into shards, of one rank", seconds_of(lambda: shards, rounds))
    engine = TransformersEngine()
    engine.start(path, max_context_tokens=256)
    for name, model in {"all": PolicyModel.load(path), "shards": shards()}.items():
        sync = lambda model=model: engine.load_weights(weights_of(model, True), 1)  # noqa: E731
        line(f"weights into TransformersEngine, from {name}", seconds_of(lambda sync=sync: sync, rounds))
    torch.distributed.destroy_process_group()


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["start", "model", "samples", "tasks", "ranks"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 2000, 4000])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2500, 5000, 10_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    print(f"seconds of the process, median of {given.rounds}; OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS')}")
    with tempfile.TemporaryDirectory() as scratch:
        folder, rounds = Path(scratch), given.rounds
        parts: dict[str, Work] = {
            "start": lambda: starts(rounds),
            "model": lambda: models(rounds, folder),
            "samples": lambda: table(
                "samples of an iteration", given.sizes, lambda size: per_samples(size, folder / "store"), rounds
            ),
            "tasks": lambda: table("tasks of a file", given.tasks, lambda size: per_tasks(size, folder), rounds),
            "ranks": lambda: table("ranks", given.ranks, per_ranks, rounds),
        }
        for part in given.parts:
            parts[part]()


if __name__ == "__main__":
    main()
