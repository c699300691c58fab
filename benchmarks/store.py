"""What writing to the store takes of an iteration, and how large it is.

python benchmarks/store.py [--config configs/tiny.yaml] [--engine TransformersEngine] [--iterations 12]

Trains once, and reads what the run itself logged: the seconds that it spent writing since the optimizer step before,
for the turns of the iteration, the trainer's log-probabilities and, every other time, an evaluation. The same turns
are made JSON lines besides, to compare their size. Then a phase of long prompts, as large databases have them, is
written without training: 8 tasks, 8 attempts, 6 turns, ids drawn by Zipf's law.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import numpy as np
import pyarrow.parquet

from lit_stepwise.store.find import find_run
from lit_stepwise.store.read import open_run, rows_of
from lit_stepwise.store.write import StoredPhase, TrajectoryStore
from lit_stepwise.types import Feedback, StopReason, Trajectory, Turn, VersionSpan

PARTS = ("seconds/play", "seconds/sync", "seconds/train", "seconds/evaluate", "seconds/store")


def train(arguments: argparse.Namespace, folder: Path) -> None:
    script = Path(sys.executable).with_name("lit-stepwise")
    words = [
        "fit", "--config", arguments.config, "--rollout.engine", arguments.engine,
        "--trainer.max_epochs", str(arguments.iterations), "--trainer.enable_progress_bar", "false",
        "--trainer.default_root_dir", str(folder),
    ]  # fmt: skip
    done = subprocess.run([str(script), *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)


def report(folder: Path) -> None:
    connection = open_run(folder)
    query = "select name, list(value order by step) as found from metrics where name like 'seconds/%' group by name"
    found = {row["name"]: row["found"] for row in rows_of(connection, query)}
    total = sum(sum(found[name]) for name in PARTS)
    first, *others = found["seconds/store"]
    iteration = (total - first - sum(others)) / (1 + len(others))
    print(f"{1 + len(others)} iterations of {iteration:.2f} s in the mean, evaluations included")
    print(f"writing: {first:.3f} s in the first, which loads what it needs; in the others")
    for name, value in (("median", median(others)), ("mean", mean(others)), ("largest", max(others))):
        print(f"{name:>10} {value:.4f} s, {value / iteration:.2%} of an iteration")
    print(f"{'all':>10} {(first + sum(others)) / total:.2%} of the run, the first included")
    columns = "* exclude (trained_at, trainer_logprobs, logprob_gap, logprob_gap_max)"
    lines = [json.dumps(row, default=str) for row in rows_of(connection, f"select {columns} from turns")]
    run = find_run(folder)
    played, learnt = (sum(path.stat().st_size for _, path in run.files(kind)) for kind in ("play", "learnt"))
    size = sum(len(line.encode()) + 1 for line in lines)
    print(f"size: {len(lines):,} turns take {played / 1e6:.2f} MB")
    print(f"      {size / 1e6:.2f} MB as JSON lines, {size / played:.1f} times as much")
    print(f"      what was learnt from them takes {learnt / 1e6:.2f} MB")


def long_prompts() -> list[Trajectory]:
    """Each turn's prompt is the one before it, its response (300 tokens) and an observation (500)."""
    draw = np.random.default_rng(0)

    def ids(size: int) -> list[int]:
        return (draw.zipf(1.2, size) % 150_000).tolist()  # type: ignore[no-any-return]

    played = []
    for group in range(8):
        schema = ids(int(draw.integers(2_000, 8_000)))
        for sample in range(8):
            turns, prompt = [], schema
            for _ in range(6):
                response, logprobs = ids(300), (-draw.exponential(size=300)).tolist()
                turns.append(Turn(prompt, response, logprobs, [VersionSpan(0, 300)], "", Feedback("")))
                prompt = [*prompt, *response, *ids(500)]
            played.append(Trajectory(str(group), group, sample, turns, StopReason.MAX_TURNS))
    return played


def report_long(folder: Path) -> None:
    played, took = long_prompts(), []
    for _ in range(3):
        began = time.perf_counter()
        path = TrajectoryStore(folder).write(StoredPhase("train", 0, played, 0))
        took.append(time.perf_counter() - began)
    lengths = [len(turn.prompt_ids) for each in played for turn in each.turns]
    print(f"\n{len(lengths)} turns of {min(lengths):,} to {max(lengths):,} prompt tokens: written in {min(took):.2f} s")
    row_group = pyarrow.parquet.read_metadata(path).row_group(0)
    sizes = {(c := row_group.column(i)).path_in_schema: c.total_compressed_size for i in range(row_group.num_columns)}
    for name, leaf, count in (
        ("prompt_ids", "prompt_ids.list.element", sum(lengths)),
        ("response_ids", "response_ids.list.element", 300 * len(lengths)),
        ("rollout_logprobs", "rollout_logprobs.list.element", 300 * len(lengths)),
    ):
        print(f"{name:>16} {sizes[leaf] / 1e3:8,.0f} kB, {sizes[leaf] / count:.2f} bytes a token")


def main() -> None:
    """Train, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--engine", default="TransformersEngine")
    parser.add_argument("--iterations", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train(arguments, Path(folder))
        report(Path(folder))
        report_long(Path(folder) / "long")


if __name__ == "__main__":
    main()
