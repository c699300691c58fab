"""What the card index of examples/ learns: accuracy by optimizer step, for several seeds.

Each seed has tasks, a warmed-up model and draws of its own. Other words go to ``fit``.

python benchmarks/card_index.py [--seeds 0 1 2] [--section.key VALUE ...] > benchmarks/results/card_index.txt
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "card_index"


@dataclass(frozen=True)
class Run:
    """One seed."""

    greedy: dict[int, float]
    """Accuracy on the validation tasks after so many steps."""
    sampled: dict[int, float]
    """Of the attempts drawn at random on which that step was trained."""
    prepare_seconds: float
    fit_seconds: float


def run(seed: int, words: list[str]) -> Run:
    """Prepare and train in a scratch folder, and read what its files say."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(EXAMPLE, Path(scratch) / "card_index", ignore=shutil.ignore_patterns("__pycache__"))
        fit = [str(Path(sys.executable).with_name("lit-stepwise")), "fit", "--config", "config.yaml"]
        moments = [time.perf_counter()]
        for command in ([sys.executable, "prepare.py", str(seed)], [*fit, "--seed_everything", str(seed), *words]):
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            moments.append(time.perf_counter())
        with (folder / "runs" / "version_0" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
    before, *later = ((int(row["step"]), float(row["val/accuracy"])) for row in rows if row["val/accuracy"])
    sampled = {int(row["step"]) + 1: float(row["rollout/accuracy"]) for row in rows if row["rollout/accuracy"]}
    greedy = {0: before[1], **{step + 1: accuracy for step, accuracy in later}}
    return Run(greedy, sampled, moments[1] - moments[0], moments[2] - moments[1])


def main() -> None:
    """Run the seeds one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments, words = parser.parse_known_args()
    seeds = arguments.seeds
    runs = [run(seed, words) for seed in seeds]
    for title, name in (("greedy, 128 held-out tasks", "greedy"), ("drawn at random, as trained", "sampled")):
        print(f"{title}\n  step  {'  '.join(f'seed {seed}' for seed in seeds)}")
        for step in getattr(runs[0], name):
            print(f"  {step:4}  {'  '.join(f'{getattr(each, name)[step]:6.1%}' for each in runs)}")
    print(f"seconds of prepare.py: {', '.join(f'{each.prepare_seconds:.0f}' for each in runs)}")
    print(f"seconds of fit: {', '.join(f'{each.fit_seconds:.0f}' for each in runs)}")


if __name__ == "__main__":
    main()
