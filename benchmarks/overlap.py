"""What play ahead of training saves, and what it does to learning, on the demo.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py [--engine VLLMServerEngine] [--seeds 0 1 2] [--staleness 0 1]

Runs the console script on configs/tiny.yaml, in free order of turns, once for every seed and staleness, turn about. An
iteration's time is that between the moments at which two neighbouring iterations were handed to the trainer, so that
starting up and the validation at the end are left out.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import mean, median


def run(arguments: argparse.Namespace, seed: int, staleness: int, folder: Path) -> dict[str, float]:
    """Accuracy at the end, seconds of an iteration, and what the run logged of waiting."""
    script = Path(sys.executable).with_name("lit-stepwise")
    words = [
        "fit", "--config", arguments.config, "--rollout.engine", arguments.engine, "--seed_everything", str(seed),
        "--rollout.staleness", str(staleness), "--rollout.deterministic", "false",
        "--trainer.max_epochs", str(arguments.iterations), "--trainer.num_sanity_val_steps", "0",
        "--trainer.check_val_every_n_epoch", str(arguments.iterations), "--trainer.enable_progress_bar", "false",
        "--trainer.default_root_dir", str(folder),
    ]  # fmt: skip
    done = subprocess.run([str(script), *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    files = sorted((folder / "version_0" / "trajectories").glob("train-*.parquet"))
    times = [path.stat().st_mtime for path in files]
    with (folder / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))

    def logged(name: str) -> list[float]:
        return [float(row[name]) for row in rows if row.get(name)]

    return {
        "iteration": median(b - a for a, b in pairwise(times)),
        "accuracy": logged("val/accuracy")[-1],
        "trainer idle": mean(logged("idle/trainer")),
        "engine idle": mean(logged("idle/engine")),
        "stale": mean(logged("rollout/staleness")),
    }


def main() -> None:
    """Print every run and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--engine", default="VLLMServerEngine")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    print(f"{arguments.config}, {arguments.engine}, {os.cpu_count()} CPUs, OMP_NUM_THREADS {threads}")
    found: dict[int, list[dict[str, float]]] = {each: [] for each in arguments.staleness}
    for seed in arguments.seeds:
        for staleness in arguments.staleness:
            with tempfile.TemporaryDirectory() as folder:
                result = run(arguments, seed, staleness, Path(folder))
            found[staleness].append(result)
            print(
                f"seed {seed}  staleness {staleness}  accuracy {result['accuracy']:.1%}  an iteration "
                f"{result['iteration']:.2f} s  trainer idle {result['trainer idle']:.0%}  engine idle "
                f"{result['engine idle']:.0%}  tokens {result['stale']:.2f} steps old",
                flush=True,
            )
    base = arguments.staleness[0]
    for staleness in arguments.staleness[1:]:
        pairs = list(zip(found[staleness], found[base], strict=True))
        ratios = [a["iteration"] / b["iteration"] for a, b in pairs]
        means = [mean(each["accuracy"] for each in found[which]) for which in (staleness, base)]
        print(
            f"staleness {staleness} / {base}: time of an iteration {median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}); mean accuracy {means[0]:.1%} and {means[1]:.1%}"
        )


if __name__ == "__main__":
    main()
