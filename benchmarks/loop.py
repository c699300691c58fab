"""Where the time of an iteration goes, for both engines on the same tasks, weights and seeds.

    python benchmarks/loop.py [--iterations 4] [--engines TransformersEngine VLLMEngine] [--config configs/tiny.yaml]

Runs the console script once per engine and reads what the run logged. The first iteration warms up and is left out.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

PHASES = ("play", "engine", "environment", "sync", "train")
TOKENS = ("generated", "trained", "forwarded", "saved")


def run(engine: str, config: str, iterations: int, folder: Path) -> list[dict[str, float]]:
    """One row of ``seconds/*`` and ``tokens/*`` per iteration."""
    script = Path(sys.executable).with_name("lit-stepwise")
    words = [
        "fit", "--config", config, "--rollout.engine", engine, "--trainer.max_epochs", str(iterations),
        "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false",
        "--trainer.default_root_dir", str(folder),
    ]  # fmt: skip
    subprocess.run([str(script), *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    steps: dict[int, dict[str, float]] = {}
    with (folder / "version_0" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            wanted = {
                name: float(value) for name, value in row.items() if value and name.startswith(("seconds", "tokens"))
            }
            steps.setdefault(int(row["step"]), {}).update(wanted)
    return [steps[step] for step in sorted(steps)][1:]


def report(engine: str, rows: list[dict[str, float]]) -> None:
    """Medians over iterations."""
    seconds = {phase: median(row[f"seconds/{phase}"] for row in rows) for phase in PHASES}
    rates = {
        "generated": median(row["tokens/generated"] / row["seconds/engine"] for row in rows),
        "trained": median(row["tokens/trained"] / row["seconds/train"] for row in rows),
        "forwarded": median(row["tokens/forwarded"] / row["seconds/train"] for row in rows),
    }
    counts = {kind: median(row[f"tokens/{kind}"] for row in rows) for kind in TOKENS}
    print(f"{engine}, median of {len(rows)} iterations")
    print("  seconds   " + "  ".join(f"{phase} {value:.2f}" for phase, value in seconds.items()))
    print("  tokens    " + "  ".join(f"{kind} {value:.0f}" for kind, value in counts.items()))
    print("  tokens/s  " + "  ".join(f"{kind} {value:.0f}" for kind, value in rates.items()))


def main() -> None:
    """Print both engines and what the machine is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--engines", nargs="+", default=["TransformersEngine", "VLLMEngine"])
    parser.add_argument("--config", default="configs/tiny.yaml")
    arguments = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    print(f"{arguments.config}, {os.cpu_count()} CPUs, OMP_NUM_THREADS {threads}")
    for engine in arguments.engines:
        with tempfile.TemporaryDirectory() as folder:
            report(engine, run(engine, arguments.config, arguments.iterations, Path(folder)))


if __name__ == "__main__":
    main()
