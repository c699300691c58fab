"""The learning curve of a config on several seeds: a table, and a plot for the README.

python benchmarks/learning.py [--seeds 0 1 2] [--engine TransformersEngine] [--plot docs/learning.png]
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

Curve = list[tuple[int, float]]


def run(config: str, engine: str, seed: int, folder: Path) -> tuple[Curve, float]:
    """[(step, greedy accuracy on the validation tasks)], and the seconds of the whole command."""
    script = Path(sys.executable).with_name("lit-stepwise")
    words = [
        "fit", "--config", config, "--rollout.engine", engine, "--seed_everything", str(seed),
        "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(folder),
    ]  # fmt: skip
    began = time.monotonic()
    done = subprocess.run([str(script), *words], check=True, capture_output=True, text=True)
    seconds = time.monotonic() - began
    said = "; ".join(line.split(":")[0] for line in done.stdout.splitlines() if line.startswith(("accuracy", "time")))
    print(f"seed {seed}: {' '.join(said.split())}; whole command {seconds:.0f} s", flush=True)
    with (folder / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/accuracy"]]
    return [(int(row["step"]), float(row["val/accuracy"])) for row in rows], seconds


def plot(curves: dict[int, Curve], title: str, path: Path) -> None:
    """One line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for seed, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker="o", markersize=4, label=f"seed {seed}")
    axes.set(xlabel="optimizer step (one iteration each)", ylabel="greedy execution accuracy", ylim=(0, 1), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the seeds one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--engine", default="TransformersEngine")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    print(f"{arguments.config}, {arguments.engine}")
    curves = {}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            curves[seed], _ = run(arguments.config, arguments.engine, seed, Path(folder))
        print("  " + "  ".join(f"{step}: {accuracy:.1%}" for step, accuracy in curves[seed]), flush=True)
    if arguments.plot is not None:
        plot(curves, "held-out demo tasks, 128 of them", arguments.plot)


if __name__ == "__main__":
    main()
