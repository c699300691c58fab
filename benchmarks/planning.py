"""What is lost when a mini-batch is cut into micro-batches and dealt out to ranks, and how long the planning takes.

    OMP_NUM_THREADS=1 python benchmarks/planning.py [--tasks 32 128] [--ranks 8] [--budgets 32768 65536] [--rounds 3]

Nothing is trained: the workloads are those of ``benchmarks/workloads.py`` at full size, five samples a task, and the
FLOPs are those of Qwen3-4B.

    trees       tokens of the trees, over those of all samples
    rounds      micro-batches of each rank
    repeated    tokens, and FLOPs, that are computed again because samples that share them are apart
    step        sum over the rounds of the costliest rank's FLOPs, over those of trees that are not cut, dealt out
                perfectly
    ids         seconds to make arrays of the lists of token ids, which are the same for all budgets
    plan        seconds of the rest; both of the process, on one thread, the median of the rounds
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any
from unittest.mock import patch

from workloads import SHAPES, workload

from lit_stepwise.algo import microbatches
from lit_stepwise.algo.flops import Flops
from lit_stepwise.algo.microbatches import Run, cut, families_of, plan_micro_batches
from lit_stepwise.algo.packing import tokens_of
from lit_stepwise.types import StepSample

QWEN3_4B = Flops(per_token=7.27e9, per_pair=4 * 36 * 32 * 128, per_target=2 * 2560 * 151_936)
UNLIMITED = 10**12


def uncut(samples: Sequence[StepSample]) -> Run:
    """FLOPs and tokens of their trees, one for each group."""
    runs = [run for family in families_of(samples, "tree") for run in cut(family, UNLIMITED, QWEN3_4B)]
    return Run(sum(run.flops for run in runs), sum(run.tokens for run in runs), [])


def timed(work: Callable[[], Any], rounds: int) -> tuple[Any, float]:
    """What it gives, and process seconds."""
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        result = work()
        seconds.append(time.process_time() - began)
    return result, median(seconds)


def measure(samples: Sequence[StepSample], budget: int, ranks: int, rounds: int) -> str:
    """Of one workload and budget, with the arrays at hand."""
    plan, seconds = timed(lambda: plan_micro_batches(samples, budget, QWEN3_4B, "tree", ranks), rounds)
    done = [[uncut([samples[i] for i in part]) for part in parts] for parts in zip(*plan, strict=True)]
    ideal = uncut(samples)
    tokens = sum(run.tokens for runs in done for run in runs) / ideal.tokens - 1
    flops = sum(run.flops for runs in done for run in runs) / ideal.flops - 1
    step = sum(max(run.flops for run in runs) for runs in done) / (ideal.flops / ranks)
    return f"{budget:>7} {len(done):>6} {tokens:>8.1%} {flops:>7.1%} {step:>7.3f} {seconds:>7.3f}"


def line(name: str, template: str, samples: Sequence[StepSample], arguments: argparse.Namespace) -> str:
    """Of one workload."""
    arrays, seconds = timed(lambda: {id(sample): tokens_of(sample) for sample in samples}, arguments.rounds)
    with patch.object(microbatches, "tokens_of", lambda sample: arrays[id(sample)]):
        tree = uncut(samples).tokens
        found = [measure(samples, budget, arguments.ranks, arguments.rounds) for budget in arguments.budgets]
    tokens = sum(sample.num_tokens for sample in samples)
    tasks = len({sample.group for sample in samples})
    sizes = f"{len(samples):>7} {tokens / 1e6:>6.2f}M {tree / tokens:>8.1%}"
    return " | ".join([f"{tasks:>5} {name} {template:<6} {sizes} {seconds:>7.3f}", *found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--budgets", type=int, nargs="+", default=[32768, 65536])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{arguments.ranks} ranks, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}")
    header = f"{'budget':>7} {'rounds':>6} {'repeated':>8} {'FLOPs':>7} {'step':>7} {'plan':>7}"
    print(f"tasks workload samples  tokens    trees {'ids':>7} | {' | '.join([header] * len(arguments.budgets))}")
    for tasks in arguments.tasks:
        for name in SHAPES:
            for template in ("append", "strip") if name != "E" else ("append",):
                samples = workload(name, template, tasks, arguments.seed)
                print(line(name, template, samples, arguments), flush=True)


if __name__ == "__main__":
    main()
