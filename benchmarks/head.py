"""Seconds and memory of log-probabilities with their gradient, by what is done about the matrix of logits.

    OMP_NUM_THREADS=1 python benchmarks/head.py [--rounds 3] [--rows 4096] [--hidden 512] [--vocabulary 32768]

Forward and backward pass over [rows, hidden] float32 states and a [vocabulary, hidden] head, both with a gradient:

    full          all logits at once: log_softmax, gather, entropy
    checkpoint    the same on 512 rows at a time under torch.utils.checkpoint
    torch's       torch.nn.functional.linear_cross_entropy in chunks of its choice; it has neither entropies nor a
                  temperature, so it does less than the others
    ours N        lit_stepwise.algo.logprobs.token_logprobs, N rows at a time

Every measurement is a process of its own, one after the other, all ways in turn and so many rounds. Seconds are those
of its CPU, memory is what the peak of the process rises by: medians. Last, how far bfloat16 takes the log-probabilities
from those of float64 on the same bfloat16 states and head.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear, linear_cross_entropy
from torch.utils.checkpoint import checkpoint

from lit_stepwise.algo.logprobs import token_logprobs

Way = Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
DEFAULT_CHUNK = inspect.signature(token_logprobs).parameters["chunk_tokens"].default
CHUNKS = (512, 1024, 2048)


def full(
    hidden: Tensor, head: Tensor, targets: Tensor, temperatures: Tensor, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    logprobs = (linear(hidden, head) / temperatures[:, None]).log_softmax(-1)
    with torch.set_grad_enabled(entropy_gradient):
        entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropies


def checkpointed(
    hidden: Tensor, head: Tensor, targets: Tensor, temperatures: Tensor, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    parts = [
        checkpoint(full, h, head, t, s, entropy_gradient, use_reentrant=False)
        for h, t, s in zip(*(torch.split(x, 512) for x in (hidden, targets, temperatures)), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def torchs(
    hidden: Tensor, head: Tensor, targets: Tensor, temperatures: Tensor, entropy_gradient: bool
) -> tuple[Tensor, None]:
    options = torch.nn.LinearCrossEntropyOptions()
    return -linear_cross_entropy(hidden, head, targets, reduction="none", options=options), None


def ours(
    chunk: int, hidden: Tensor, head: Tensor, targets: Tensor, temperatures: Tensor, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    return token_logprobs(hidden, head, targets, temperatures, chunk, entropy_gradient)


WAYS: dict[str, Way] = {
    "full": full,
    "checkpoint": checkpointed,
    "torch's": torchs,
    **{f"ours {chunk}": partial(ours, chunk) for chunk in CHUNKS},
}
OURS = f"ours {DEFAULT_CHUNK}"


def inputs(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of standard deviation 2, which is about what a model's have; temperature 1, so that torch's compares."""
    torch.manual_seed(1)
    states = torch.randn(rows, hidden, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, hidden, dtype=dtype).mul_(2 * hidden**-0.5).requires_grad_()
    return states, head, torch.randint(vocabulary, (rows,)), torch.ones(rows)


def passes(way: Way, given: tuple[Tensor, Tensor, Tensor, Tensor], entropy_gradient: bool) -> float:
    """Both passes; the sum of the log-probabilities."""
    logprobs, entropies = way(*given, entropy_gradient)
    loss = (logprobs * torch.linspace(-1, 1, len(logprobs))).sum()
    if entropy_gradient and entropies is not None:
        loss = loss - 0.01 * entropies.sum()
    loss.backward()
    return float(logprobs.detach().sum())


def peak_megabytes() -> float:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, entropy_gradient: bool, arguments: argparse.Namespace) -> dict[str, float]:
    """In this process, which must have done nothing else."""
    way = WAYS[name]
    passes(way, inputs(8, 16, 64, torch.float32), entropy_gradient)  # starts the libraries
    given = inputs(arguments.rows, arguments.hidden, arguments.vocabulary, torch.float32)
    megabytes, began = peak_megabytes(), time.process_time()
    total = passes(way, given, entropy_gradient)
    seconds = time.process_time() - began
    norms = {f"norm{i}": float(x.grad.norm()) for i, x in enumerate(given[:2]) if x.grad is not None}
    return {"seconds": seconds, "megabytes": peak_megabytes() - megabytes, "total": total, **norms}


def measured_apart(name: str, entropy_gradient: bool) -> dict[str, float]:
    """The same in a process of its own."""
    words = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    words += ["--entropy-gradient"] if entropy_gradient else []
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def same_results(found: dict[str, dict[str, float]]) -> None:
    """Refuse to compare ways that compute different things."""
    expected = found["full"]
    for name, result in found.items():
        for key in ("total", "norm0", "norm1"):
            assert abs(result[key] / expected[key] - 1) < 1e-4, (name, key, result, expected)


def table(entropy_gradient: bool, arguments: argparse.Namespace) -> None:
    """All ways, and two ratios."""
    names = ["full", "checkpoint", OURS] if entropy_gradient else list(WAYS)
    rounds = []
    for _ in range(arguments.rounds):
        rounds.append({name: measured_apart(name, entropy_gradient) for name in names})
        same_results(rounds[-1])
    print(f"\nentropies {'with' if entropy_gradient else 'without'} gradient")
    print(f"  {'':14}{'CPU s':>8}{'(all rounds)':>18}{'peak MB':>10}{'time/full':>11}{'peak/full':>11}")
    for name in names:
        seconds, megabytes = ([each[name][key] for each in rounds] for key in ("seconds", "megabytes"))
        slower = median(each[name]["seconds"] / each["full"]["seconds"] for each in rounds)
        larger = median(each[name]["megabytes"] / each["full"]["megabytes"] for each in rounds)
        spread = f"({min(seconds):.2f}-{max(seconds):.2f})"
        note = {"torch's": "  no entropies, no temperature", OURS: "  the default"}.get(name, "")
        times = f"{median(seconds):8.2f}{spread:>18}"
        print(f"  {name:14}{times}{median(megabytes):10.0f}{slower:11.2f}{larger:11.2f}{note}", flush=True)


def rounding(arguments: argparse.Namespace) -> None:
    """What bfloat16 does to values."""
    given = hidden, head, targets, ones = inputs(512, arguments.hidden, arguments.vocabulary, torch.bfloat16)
    with torch.no_grad():
        exact, _ = full(hidden.double(), head.double(), targets, ones, False)
        print("\n|bfloat16 - float64| of the log-probabilities")
        for name in ("torch's", OURS):
            logprobs, _ = WAYS[name](*given, False)
            errors = (logprobs.double() - exact).abs()
            print(f"  {name:14}mean {errors.mean():.1e}  max {errors.max():.1e}  given as {logprobs.dtype}")


def main() -> None:
    """Print a table without and one with a gradient of the entropies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rounds": 3, "rows": 4096, "hidden": 512, "vocabulary": 32768}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", choices=WAYS, help="measure this way in this process, and print JSON")
    parser.add_argument("--entropy-gradient", action="store_true", help="with --only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.entropy_gradient, arguments)))
        return
    sizes = {name: getattr(arguments, name) for name in ("rows", "hidden", "vocabulary", "rounds")}
    print(f"{sizes}, float32, torch {torch.__version__}, one of {os.cpu_count()} CPUs")
    for entropy_gradient in (False, True):
        table(entropy_gradient, arguments)
    rounding(arguments)


if __name__ == "__main__":
    main()
