"""What a run does when a process of its vLLM server is killed in the middle of play.

    OMP_NUM_THREADS=1 python benchmarks/kill_engine.py [--kills 20] [--seed 0]

The Countdown game with answers that take up to a second, on VLLMServerEngine with one child server. Every other kill is
of a run that may restart its engine, and that goes on to be killed again; the others are of runs that may not. Killed
is any process below the trainer that belongs to the server, at any time within the first seconds of an iteration's
play. Printed is what became of it, after how long, and what was left behind.
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
from typing import Any

import psutil
import yaml

from lit_stepwise.testing import save_tiny_model

MODULE = "lit_stepwise.engines.server.main"
GAME = """
import random, time
from dataclasses import dataclass
from lit_stepwise.testing import Countdown


@dataclass
class SlowGame(Countdown):
    def start(self, task, max_turns):
        episode = super().start(task, max_turns)
        answer = episode.step
        episode.step = lambda response: time.sleep(random.random()) or answer(response)
        return episode
"""


def config(model: Path, restarts: int) -> dict[str, Any]:
    """A run that plays for ever."""
    return {
        "model": {"model_path": str(model)},
        "data": {
            "source": {"class_path": "lit_stepwise.testing.CountdownTasks"},
            "train_files": "8",
            "tasks_per_iteration": 8,
        },
        "rollout": {
            "engine": {"class_path": "lit_stepwise.engines.VLLMServerEngine"},
            "environment": {"class_path": "slow_game.SlowGame"},
            "advantage": {"class_path": "lit_stepwise.algo.TurnReturn"},
            "samples_per_task": 8,
            "num_environment_threads": 16,
            "max_engine_restarts": restarts,
            "limits": {"max_prompt_tokens": 100, "max_context_tokens": 400, "max_new_tokens": 32, "max_turns": 6},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1000,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "default_root_dir": "runs",
        },
    }


class Run:
    """One trainer and what is below it."""

    def __init__(self, folder: Path, model: Path, restarts: int) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "slow_game.py").write_text(GAME)
        (folder / "config.yaml").write_text(yaml.safe_dump(config(model, restarts)))
        self.log = folder / "log"
        script = Path(sys.executable).with_name("lit-stepwise")
        self.process = subprocess.Popen(
            [str(script), "fit", "--config", "config.yaml"],
            cwd=folder,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    def num_iterations(self) -> int:
        """Played so far."""
        return len(list(self.folder.glob("runs/*/trajectories/train-*.parquet")))

    def wait_for_iteration(self, number: int, seconds: float) -> bool:
        """Whether so many were played within that time."""
        limit = time.monotonic() + seconds
        while self.num_iterations() < number and self.process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        return self.num_iterations() >= number

    def below(self) -> list[psutil.Process]:
        """Processes of the server."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill_one(self, rng: random.Random) -> str:
        """Its name."""
        named = {each: each.name() for each in self.below() if each.name().startswith("VLLM")}
        # the API server, whose command the process that minds it repeats
        named |= {each: "API server" for each in self.below() if each.cmdline()[1:3] == ["-m", MODULE]}
        victim = rng.choice(list(named))
        victim.kill()
        return named[victim]


def left_behind(before: list[psutil.Process], files: set[str]) -> str:
    """Processes and files in shared memory that nobody owns any more."""
    time.sleep(5)
    alive = [each for each in before if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    new = {path.name for path in Path("/dev/shm").iterdir()} - files
    return f"{len(alive)} processes, {len(new)} files left"


def stop(folder: Path, model: Path, rng: random.Random) -> str:
    """A run without restarts."""
    files = {path.name for path in Path("/dev/shm").iterdir()}
    run = Run(folder, model, restarts=0)
    if not run.wait_for_iteration(1, 180):
        raise SystemExit(run.log.read_text())
    below = run.below()
    time.sleep(rng.random() * 2)
    victim, began = run.kill_one(rng), time.monotonic()
    try:
        run.process.wait(60)
    except subprocess.TimeoutExpired:
        run.process.kill()
        return f"HANGS: {victim}"
    seconds = time.monotonic() - began
    said = [line for line in run.log.read_text().splitlines() if line.startswith("error: ")]
    traceback = ", with a traceback" if "\nTraceback" in run.log.read_text() else ""
    words = said[0][:90] if said else "no message"
    left = left_behind(below, files)
    return f"stopped after {seconds:4.1f} s, exit {run.process.returncode}{traceback}, {left}: {victim} | {words}"


def recover(run: Run, rng: random.Random) -> str:
    """One more kill of a run that restarts."""
    played = run.num_iterations()
    if not run.wait_for_iteration(played + 1, 180):
        raise SystemExit(run.log.read_text())
    played, below = run.num_iterations(), run.below()
    time.sleep(rng.random() * 2)
    victim, began = run.kill_one(rng), time.monotonic()
    if not run.wait_for_iteration(played + 3, 240):
        return f"DID NOT RECOVER: {victim}\n{run.log.read_text()[-3000:]}"
    seconds = time.monotonic() - began
    alive = [each for each in below if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    return f"recovered, two iterations further after {seconds:4.1f} s, {len(alive)} old processes left: {victim}"


def main() -> None:
    """Print a line for every kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_tiny_model(folder / "model")
        files = {path.name for path in Path("/dev/shm").iterdir()}
        immortal = Run(folder / "restarts", model, restarts=1000)
        for number in range(arguments.kills // 2):
            print(f"{number + 1:2}", recover(immortal, rng), flush=True)
        failed = immortal.log.read_text().count("failed and are left out")
        below = immortal.below()
        immortal.process.terminate()
        immortal.process.wait(30)
        print(
            f"   in {failed} iterations trajectories were left out; at the end {left_behind(below, files)}", flush=True
        )
        for number in range(arguments.kills // 2, arguments.kills):
            print(f"{number + 1:2}", stop(folder / str(number), model, rng), flush=True)


if __name__ == "__main__":
    main()
