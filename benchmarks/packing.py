"""What laying step samples into a tree saves: the same update, four ways, side by side.

    OMP_NUM_THREADS=1 python benchmarks/packing.py [--groups 2] [--shrink 8] [--rounds 3]

    padded    a row for every step sample, padded to the longest of its micro-batch, rows of like length together
    packed    a row for every step sample, laid end to end without padding
    linear    rows are merged where a prompt continues the row before it exactly, as SkyRL does; then as packed
    tree      what step samples have in common once (model.packing=tree)

Each computes the gradient of the same dual-clip loss of the same step samples, with all lengths divided by
``--shrink`` so that a CPU can; tokens are counted at full size, too. Seconds are of the process, forward and backward,
on one thread, the median of the rounds; in each round the four take turns. ``difference`` is that of the gradient to
packed's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from statistics import median

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from workloads import workload

from lit_stepwise.algo import DualClip
from lit_stepwise.algo.microbatches import plan_micro_batches
from lit_stepwise.algo.packing import Packing, collate, tokens_of
from lit_stepwise.algo.reductions import token_weights
from lit_stepwise.algo.tree import depth_first
from lit_stepwise.rollout.samples import joined
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.types import MicroBatch, StepSample

VOCABULARY = 2048
MODEL = Qwen3Config(
    vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=65536, tie_word_embeddings=True,
)  # fmt: skip


def apart(samples: Sequence[StepSample]) -> list[StepSample]:
    """The same, each a trajectory of its own, so that nothing is shared."""
    return [replace(sample, group=index) for index, sample in enumerate(samples)]


def merged(samples: Sequence[StepSample]) -> list[StepSample]:
    """Turns of a trajectory in one row, for as long as they continue each other."""
    trajectories: dict[tuple[int, int], list[StepSample]] = {}
    for sample in samples:
        trajectories.setdefault((sample.group, sample.sample), []).append(sample)
    return [row for turns in trajectories.values() for row in joined(turns)]


@dataclass(frozen=True)
class Way:
    """One way to lay samples out."""

    rows: Callable[[Sequence[StepSample]], Sequence[StepSample]]
    packing: Packing


WAYS = {
    "padded": Way(list, "none"),
    "packed": Way(apart, "trajectory"),
    "linear": Way(lambda samples: apart(merged(samples)), "trajectory"),
    "tree": Way(list, "tree"),
}


def num_tokens(way: str, samples: Sequence[StepSample]) -> int:
    """Tokens computed, without padding."""
    rows = WAYS[way].rows(samples)
    if way != "tree":
        return sum(row.num_tokens for row in rows)
    sequences = [tokens_of(row) for row in rows]
    return sum(map(len, sequences)) - sum(depth_first(sequences, [row.group for row in rows])[1])


class Update:
    """The gradient of a mini-batch, one way."""

    def __init__(self, way: str, model: Qwen3ForCausalLM, samples: Sequence[StepSample], max_tokens: int) -> None:
        rows = WAYS[way].rows(samples)
        packing = WAYS[way].packing
        self.policy = PolicyModel(deepcopy(model), packing=packing)
        weights = token_weights(rows, "token", max_new_tokens=1)
        began = time.process_time()
        (plan,) = plan_micro_batches(rows, max_tokens, self.policy.flops, packing)
        self.batches: list[MicroBatch] = [
            collate([rows[i] for i in part], [weights[i] for i in part], packing) for part in plan
        ]
        self.preparation = time.process_time() - began
        self.seconds: list[float] = []
        self.num_forwarded = sum(self.policy.num_forwarded(batch.tree) for batch in self.batches)

    def run(self) -> None:
        """Once, with the clock running."""
        self.policy.zero_grad()
        began = time.process_time()
        for batch in self.batches:
            logprobs, _ = self.policy(batch)
            kept = torch.ones_like(logprobs, dtype=torch.bool)
            said = DualClip()(logprobs, logprobs.detach() - 0.1, batch.advantages, kept, batch.turns)
            (batch.weights * said.losses).sum().backward()
        self.seconds.append(time.process_time() - began)

    def gradient(self) -> torch.Tensor:
        """Of all weights, in one row."""
        return torch.cat([each.grad.flatten() for each in self.policy.parameters()])


def compare(name: str, template: str, arguments: argparse.Namespace) -> None:
    """One workload."""
    settings = {"groups": arguments.groups, "seed": 0, "vocabulary": VOCABULARY}
    full = workload(name, template, **settings)
    counts = {way: num_tokens(way, full) for way in WAYS}
    samples = workload(name, template, **settings, shrink=arguments.shrink)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(MODEL)
    updates = {way: Update(way, model, samples, arguments.max_tokens) for way in WAYS}
    for _ in range(arguments.rounds):
        for update in updates.values():
            update.run()
    seconds = {way: median(update.seconds) for way, update in updates.items()}
    expected = updates["packed"].gradient()
    longest = max(each.num_tokens for each in full)
    print(f"\n{name} {template}: {len(full)} step samples, at full size of up to {longest} tokens")
    print("           tokens, full size  of packed   tokens, reduced  forwarded  cpu s  of packed  difference")
    for way, update in updates.items():
        share, reduced = counts[way] / counts["packed"], num_tokens(way, samples)
        difference = float((update.gradient() - expected).norm() / expected.norm())
        print(
            f"  {way:8} {counts[way]:18,}  {share:9.3f}  {reduced:15,}  {update.num_forwarded:9,}"
            f"  {seconds[way]:5.2f}  {seconds[way] / seconds['packed']:9.3f}  {difference:.1e}"
        )
    tree, ratios = updates["tree"], {way: seconds["tree"] / seconds[way] for way in ("packed", "linear")}
    print(
        f"  tree / packed {ratios['packed']:.3f}, tree / linear {ratios['linear']:.3f};"
        f" planning and laying out {tree.preparation:.3f} s, {len(tree.batches)} micro-batches"
    )


def main() -> None:
    """Every workload under both templates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["A", "B", "C", "D"])
    parser.add_argument("--templates", nargs="+", default=["append", "strip"])
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--shrink", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=16384)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{arguments.groups} groups, lengths / {arguments.shrink}, micro-batches of {arguments.max_tokens} tokens")
    for name in arguments.workloads:
        for template in arguments.templates:
            compare(name, template, arguments)


if __name__ == "__main__":
    main()
