"""How fast four kinds of credit learn the demo task, by the look-ups that a task needs: a table, and a plot of it.

All play alike (same model, tasks, seeds, generated tokens an iteration as far as the policies play alike); they differ
in the rows they train and in the advantage of a turn.

python benchmarks/credit_learning.py [--seeds 0 1 2] [--epochs 12] > benchmarks/results/credit_learning.txt
python benchmarks/credit_learning.py --plot docs/credit.png --read benchmarks/results/credit_learning.txt
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from lit_stepwise.store.read import open_run

KINDS = {
    "standard multi-turn": ["--rollout.samples", "trajectory", "--rollout.advantage", "GroupRelative"],
    "step-wise broadcast": ["--rollout.samples", "step", "--rollout.advantage", "GroupRelative"],
    "TurnReturn": ["--rollout.samples", "step", "--rollout.advantage", "TurnReturn"],
    "GiGPO": ["--rollout.samples", "step", "--rollout.advantage", "GiGPO"],
    "StateValueGAE": ["--rollout.samples", "step", "--rollout.advantage", "StateValueGAE"],
}
PADDED = {f"{kind}, padded rows": [*KINDS[kind], "--model.packing", "none"] for kind in list(KINDS)[:2]}
"""What rows cost where nothing that they have in common is shared; only run when ``--kinds`` names them."""
GRADES = (0, 1, 2, 3)
SUMS = ("tokens/generated", "tokens/forwarded", "seconds/train", "seconds/play")


@dataclass
class Curve:
    """One run: greedy accuracy on the validation tasks by step, over all and by look-ups, and what all of it took."""

    all: dict[int, float] = field(default_factory=dict)
    by_grade: dict[int, dict[int, float]] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    """Of a metric over the run, for each of ``SUMS``."""


def run(kind: str, seed: int, epochs: int, engine: str, config: str) -> Curve:
    """Train in a scratch folder, and read what its files say."""
    script = Path(sys.executable).with_name("lit-stepwise")
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "fit", "--config", config, "--rollout.engine", engine, "--seed_everything", str(seed),
            "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", folder,
            "--trainer.max_epochs", str(epochs), *(KINDS | PADDED)[kind],
        ]  # fmt: skip
        subprocess.run([str(script), *words], check=True, capture_output=True, text=True)
        return read(Path(folder) / "version_0", Path("data/demo/val.jsonl"))


def read(folder: Path, tasks: Path) -> Curve:
    """The curve of a finished run."""
    grades = {task["id"]: task["num_lookups"] for task in map(json.loads, tasks.read_text().splitlines())}
    curve = Curve()
    query = "select policy_version, task_id, success from trajectories where stage = 'evaluate'"
    found: dict[int, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for step, task_id, success in open_run(folder).execute(query).fetchall():
        found[step][grades[task_id]].append(success)
    for step, solved in sorted(found.items()):
        curve.all[step] = mean(each for grade in solved.values() for each in grade)
        curve.by_grade[step] = {grade: mean(solved[grade]) for grade in GRADES}
    with (folder / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    curve.sums = {name: sum(float(line[name] or 0) for line in lines) for name in SUMS}
    return curve


def report(curves: dict[str, list[Curve]]) -> None:
    """Means over seeds, with the spread between them."""
    for kind, runs in curves.items():
        generated, forwarded, training, playing = (mean(each.sums[name] for each in runs) for name in SUMS)
        seconds = f"seconds of training {training:.1f}, of play {playing:.1f}"
        print(f"\n{kind} (a run: {generated:,.0f} tokens generated, {forwarded:,.0f} forwarded; {seconds})")
        print("  step    all  " + "".join(f"{grade} look-ups  " for grade in GRADES) + "seeds")
        for step in runs[0].all:
            parts = "".join(f"{mean(each.by_grade[step][grade] for each in runs):9.1%}   " for grade in GRADES)
            seeds = "  ".join(f"{each.all[step]:.1%}" for each in runs)
            print(f"  {step:4}  {mean(each.all[step] for each in runs):6.1%}{parts} {seeds}")


def plot(text: str, path: Path) -> None:
    """What ``report`` printed: tasks of two and three look-ups beside all tasks, with a band over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (hard, every) = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for block in text.split("\n\n")[1:]:
        title, _, *lines = block.splitlines()
        rows = [[float(word.rstrip("%")) for word in line.split()] for line in lines if line.strip()]
        steps = [row[0] for row in rows]
        hard.plot(steps, [(row[4] + row[5]) / 2 for row in rows], marker="o", markersize=4)
        (line,) = every.plot(steps, [row[1] for row in rows], marker="o", markersize=4, label=title.split(" (")[0])
        seeds = [row[6:] for row in rows]
        every.fill_between(steps, list(map(min, seeds)), list(map(max, seeds)), alpha=0.12, color=line.get_color())
    for axes, title in ((hard, "tasks of 2 and of 3 look-ups, their mean"), (every, "all tasks, worst to best seed")):
        axes.set(xlabel="optimizer step (one iteration each)", ylim=(0, 100), title=title)
        axes.grid(alpha=0.3)
    hard.set_ylabel("greedy execution accuracy, %")
    every.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run every kind on every seed, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--engine", default="TransformersEngine")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS | PADDED)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plot", type=Path, help="draw what --read holds instead of running anything")
    parser.add_argument("--read", type=Path)
    arguments: Any = parser.parse_args()
    if arguments.plot is not None:
        plot(arguments.read.read_text(), arguments.plot)
        return
    places = [(kind, seed) for seed in arguments.seeds for kind in arguments.kinds]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = pool.map(lambda place: run(*place, arguments.epochs, arguments.engine, arguments.config), places)
        found = dict(zip(places, tqdm(runs, "runs", len(places)), strict=True))
    curves = {kind: [found[kind, seed] for seed in arguments.seeds] for kind in arguments.kinds}
    print(f"{arguments.config}, {arguments.engine}, {arguments.epochs} iterations, seeds {arguments.seeds}")
    report(curves)


if __name__ == "__main__":
    main()
