"""What a run that is killed again and again, and resumed each time, has in common with one that was left alone.

    OMP_NUM_THREADS=1 python benchmarks/kill_training.py [--kills 30] [--seed 0]

The Countdown game on the transformers engine, deterministic, with two optimizer steps and two checkpoints an iteration:
half of the kills are of one process, half of two that share the model (fsdp2, folders of shards). Each is kill -9 from
outside at a random time within a phase that the run has announced, or at any time at all; of two processes both at once
or one alone. Resumed is with ``--ckpt_path last``. Compared with the uninterrupted run are, for every step, the weights
(sha256), the samples it was made of and all metrics that are no clock, and for every iteration its tasks.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml

from lit_stepwise.testing import save_tiny_model

ROOT = Path(__file__).parent.parent
KINDS = ("play", "training", "weight sync", "saving", "evaluation", "any time")
ANY_TIME = 15.0
"""Seconds after the start within which a kill at any time is."""


def config(model: Path, num_iterations: int, num_processes: int) -> dict[str, Any]:
    """Of one run."""
    saving = {
        "every_n_train_steps": 1, "save_last": "link", "save_top_k": 1, "filename": "{step}",
        "enable_version_counter": False,
    }  # fmt: skip
    return {
        "model": {
            "model_path": str(model),
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
            "lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.LinearLR",
                "init_args": {"start_factor": 1.0, "end_factor": 0.1, "total_iters": 2 * num_iterations},
            },
        },
        "data": {
            "source": {"class_path": "lit_stepwise.testing.CountdownTasks"},
            "train_files": "9", "val_files": "4", "tasks_per_iteration": 3, "mini_batches": 2,
        },
        "rollout": {
            "engine": {"class_path": "benchmarks.watched.WatchedEngine"},
            "environment": {"class_path": "lit_stepwise.testing.Countdown"},
            "advantage": {"class_path": "lit_stepwise.algo.TurnReturn"},
            "samples_per_task": 4,
            "deterministic": True,
            "limits": {"max_prompt_tokens": 100, "max_context_tokens": 200, "max_new_tokens": 8, "max_turns": 3},
        },
        "trainer": {
            "accelerator": "cpu", "devices": num_processes, "strategy": "auto" if num_processes == 1 else "fsdp2",
            "max_epochs": num_iterations, "check_val_every_n_epoch": 2, "num_sanity_val_steps": -1,
            "log_every_n_steps": 1, "enable_model_summary": False, "enable_progress_bar": False,
            "default_root_dir": "runs",
            "callbacks": [
                {"class_path": "benchmarks.watched.Watched"},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving},
            ],
        },
    }  # fmt: skip


@dataclass
class Run:
    """A folder in which a run is started again and again, until it has come to its end."""

    folder: Path
    config: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    """Of a phase, in the mean."""

    def __post_init__(self) -> None:
        self.folder.mkdir()
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config))

    def start(self) -> subprocess.Popen[bytes]:
        """One more time."""
        (self.folder / "phases.txt").write_text("")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        script = Path(sys.executable).with_name("lit-stepwise")
        with (self.folder / "log").open("w") as log:
            return subprocess.Popen(
                [str(script), "fit", "--config", "config.yaml", "--ckpt_path", "last"],
                cwd=self.folder, stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip

    def phases(self) -> list[tuple[float, str]]:
        """When each began."""
        lines = (self.folder / "phases.txt").read_text().split("\n")[:-1]
        return [(float(line.split(" ", 1)[0]), line.split(" ", 1)[1]) for line in lines]

    def log(self) -> str:
        """Of the last start."""
        return (self.folder / "log").read_text()

    def resumed_from(self) -> str:
        """As it said itself."""
        said = [line for line in self.log().splitlines() if line.startswith("ckpt_path=last: ")]
        return said[-1].removeprefix("ckpt_path=last: ") if said else "?"

    def notes(self) -> dict[int, dict[str, Any]]:
        """What each optimizer step was made of; of one that was done twice the last, which counts."""
        path = self.folder / "trained.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return {each["step"]: each for each in found}

    def metrics(self) -> dict[tuple[int, str], str]:
        """All that are no clock, as they are written, by step and name; later runs over earlier ones."""
        found: dict[tuple[int, str], str] = {}
        for path in sorted(self.folder.glob("runs/version_*/metrics.csv"), key=lambda each: int(each.parent.name[8:])):
            with path.open() as file:
                for row in csv.DictReader(file):
                    step = int(row.pop("step"))
                    found |= {(step, name): value for name, value in row.items() if value and _is_no_clock(name)}
        return found


def _is_no_clock(name: str) -> bool:
    return name.split("/")[0] in ("train", "rollout", "val", "tokens", "flops") and name != "tokens/cached"


def uninterrupted(run: Run) -> Run:
    """Let it run, and learn how long its phases take."""
    if run.start().wait() != 0:
        raise SystemExit(run.log())
    phases = run.phases()
    spans: dict[str, list[float]] = {}
    for (began, name), (ended, _) in pairwise(phases):
        spans.setdefault(name, []).append(ended - began)
    run.seconds = {name: sum(each) / len(each) for name, each in spans.items()}
    return run


@dataclass(frozen=True)
class Kill:
    """What is planned."""

    kind: str
    """The phase to be in, or any time."""
    who: str
    """all, or one rank alone."""
    occurrence: int
    within: float
    """From 0 at its beginning to 1 at its end."""


def planned(num: int, num_processes: int, rng: random.Random) -> list[Kill]:
    """Each phase about as often as the others."""
    who = ["all"] if num_processes == 1 else ["all", "all", "rank 0", "all", "rank 1"]
    kinds = [(KINDS[i % len(KINDS)], who[i % len(who)]) for i in range(num)]
    return [Kill(kind, who, rng.choice([1, 1, 2]), rng.random()) for kind, who in kinds]


def killed(run: Run, kill: Kill, seconds: dict[str, float]) -> tuple[str, str] | None:
    """Start it and kill it: the phase it was in and what became of the rest; None where it came to its end before."""
    process = run.start()
    began = time.monotonic()
    while process.poll() is None and not _is_time(kill, run.phases(), began, seconds):
        time.sleep(0.001)
    if process.poll() is not None:
        if process.returncode != 0:
            raise SystemExit(run.log())
        return None
    _kill(process, kill.who)
    ending = _ending(process, kill.who)
    phases = run.phases()
    return phases[-1][1] if phases else "start", ending


def _is_time(kill: Kill, phases: list[tuple[float, str]], began: float, seconds: dict[str, float]) -> bool:
    if kill.kind == "any time":
        return time.monotonic() - began > ANY_TIME * kill.within
    starts = [when for when, name in phases if name == kill.kind]
    if len(starts) < kill.occurrence:
        return False
    return time.monotonic() > starts[kill.occurrence - 1] + kill.within * seconds[kill.kind]


def _kill(process: subprocess.Popen[bytes], who: str) -> None:
    children = psutil.Process(process.pid).children()
    if who == "rank 0":
        process.kill()
    elif who == "rank 1" and children:
        children[0].kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)


def _ending(process: subprocess.Popen[bytes], who: str) -> str:
    """How long the other processes of the group lived on. After a minute they are killed."""
    began = time.monotonic()
    while members := _members(process.pid):
        process.poll()
        if time.monotonic() - began > 60:
            for member in members:
                os.kill(member, signal.SIGKILL)
            process.wait()
            return "HANGS"
        time.sleep(0.05)
    process.wait()
    return "" if who == "all" else f"the other ended {time.monotonic() - began:.1f} s later"


def _members(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


def differences(run: Run, alone: Run, whole: bool) -> list[str]:
    """Between what counts of ``run``, as far as it is, and the one that was left alone; empty where there is none."""
    ours, theirs = run.notes(), alone.notes()
    found = [f"step {step}: {name}" for step, note in ours.items() for name in note if note[name] != theirs[step][name]]
    our_metrics, their_metrics = run.metrics(), alone.metrics()
    found += [f"{key}: {value}" for key, value in our_metrics.items() if their_metrics.get(key) != value]
    if whole:
        found += [f"step {step} is missing" for step in theirs.keys() - ours.keys()]
        found += [f"{key} is missing" for key in sorted(their_metrics.keys() - our_metrics.keys())]
        found += _not_once(ours)
    return found


def _not_once(notes: dict[int, dict[str, Any]]) -> list[str]:
    """Tasks that an iteration has twice among its optimizer steps."""
    counts = Counter((note["iteration"], task) for note in notes.values() for task in note["tasks"])
    return [f"{key} {number} times" for key, number in counts.items() if number != 1]


def rows(run: Run, alone: Run, kills: list[Kill]) -> Iterator[str]:
    """A line for each kill, and one for the end."""
    for number, kill in enumerate(kills, 1):
        before = max(run.notes(), default=0)
        became = killed(run, kill, alone.seconds)
        if became is None:
            yield f"     came to its end before kill {number}"
            break
        phase, ending = became
        wrong = differences(run, alone, whole=False)
        verdict = "equal" if not wrong else f"DIFFERENT: {wrong[:2]}"
        steps = f"{before:3} ->{max(run.notes(), default=0):3}"
        yield f"{number:4}  {phase:12} {kill.who:7} {steps}  {verdict}; {run.resumed_from()}{ending and f'; {ending}'}"
    if run.start().wait() != 0:
        raise SystemExit(run.log())
    wrong = differences(run, alone, whole=True)
    verdict = "equal" if not wrong else f"{len(wrong)} DIFFERENT: {wrong[:6]}"
    yield f"      left alone to the end: {len(run.notes())} steps, {len(run.metrics())} metrics, {verdict}"


def main() -> None:
    """Print a table for one process and one for two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_tiny_model(folder / "model", hidden_size=192, num_layers=3)
        for num_processes in (1, 2):
            made = config(model, arguments.iterations, num_processes)
            alone = uninterrupted(Run(folder / f"alone-{num_processes}", made))
            spans = ", ".join(f"{name} {1000 * each:.0f}" for name, each in sorted(alone.seconds.items()))
            print(f"{num_processes} process{'es'[: 2 * num_processes - 2]}; mean milliseconds of a phase: {spans}")
            print(
                "kill  phase        who     steps       what was played and trained, metrics and weights; went on from"
            )
            kills = planned(arguments.kills // 2, num_processes, rng)
            for row in rows(Run(folder / f"killed-{num_processes}", made), alone, kills):
                print(row, flush=True)


if __name__ == "__main__":
    main()
