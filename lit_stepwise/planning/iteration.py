"""What an iteration plays and trains, if trajectories have certain lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lit_stepwise.algo.flops import Flops, pairs_of
from lit_stepwise.algo.microbatches import families_of, plan_micro_batches
from lit_stepwise.algo.packing import Packing, collate
from lit_stepwise.algo.tree_attention.layout import cut, paths
from lit_stepwise.planning.attempts import Lengths, filler, step_samples
from lit_stepwise.rollout.rendering import History
from lit_stepwise.rollout.samples import Rows
from lit_stepwise.types import Limits, MicroBatch, StepSample

_MAX_GROUPS = 24
"""Of a mini-batch, how many are made to see how they pack; more repeat them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The settings that decide what an iteration is."""

    limits: Limits
    history: History
    rows: Rows
    samples_per_task: int
    tasks_per_iteration: int
    mini_batches: int
    passes: int
    packing: Packing
    max_tokens: int
    """Of a micro-batch."""
    num_shares: int
    """Of a mini-batch: the ranks, where those that compute layers together count as one."""

    @property
    def groups_per_step(self) -> int:
        """Of a mini-batch, at most."""
        return -(-self.tasks_per_iteration // self.mini_batches)


@dataclass(frozen=True, slots=True)
class Iteration:
    """Over all ranks, unless it says otherwise."""

    num_trajectories: int
    num_turns: int
    num_step_samples: int
    generated_tokens: int
    read_tokens: int
    """Prompts and responses of all step samples."""
    distinct_tokens: int
    """Of them, what is left when a prefix that attempts at one task share counts once."""
    computed_tokens: int
    """In one forward pass over everything, as ``model.packing`` and the micro-batches have it."""
    micro_batches: int
    """Of a rank in one optimizer step."""
    num_steps: int
    """Optimizer steps."""
    num_passes: int
    """Times that each mini-batch is trained."""
    flops: float
    """Of one forward pass over everything, on the rank that others wait for."""

    @property
    def tokens_of_step(self) -> int:
        """Computed in one forward pass over a mini-batch."""
        return -(-self.computed_tokens * self.num_passes // self.num_steps)

    @property
    def prompt_tokens(self) -> int:
        """What an engine reads that caches prefixes."""
        return self.distinct_tokens - self.generated_tokens


def iteration(lengths: Lengths, shape: Shape, flops: Flops) -> tuple[Iteration, list[list[StepSample]]]:
    """What it comes to; and the micro-batches of some of its groups."""
    num_groups = min(shape.groups_per_step, _MAX_GROUPS)
    turns = step_samples(lengths, shape.limits, shape.history, "step", num_groups, shape.samples_per_task)
    samples = turns if shape.rows == "step" else step_samples(
        lengths, shape.limits, shape.history, shape.rows, num_groups, shape.samples_per_task
    )  # fmt: skip
    plan = plan_micro_batches(samples, shape.max_tokens, flops, shape.packing, shape.num_shares)
    costs = [[_cost([samples[i] for i in part], shape.packing, flops) for part in rank] for rank in plan]
    per_group = shape.tasks_per_iteration / num_groups
    leaves = [leaf for family in families_of(samples, "tree") for leaf in family]

    def of_all(number: float) -> int:
        return round(number * per_group)

    return Iteration(
        num_trajectories=shape.tasks_per_iteration * shape.samples_per_task,
        num_turns=of_all(len(turns)),
        num_step_samples=of_all(len(samples)),
        generated_tokens=of_all(sum(sample.num_response_tokens for sample in samples)),
        read_tokens=of_all(sum(sample.num_tokens for sample in samples)),
        distinct_tokens=of_all(sum(leaf.length - leaf.shared for leaf in leaves)),
        computed_tokens=of_all(sum(tokens for rank in costs for tokens, _ in rank)),
        micro_batches=-(-len(plan[0]) * shape.groups_per_step // num_groups),
        num_steps=shape.mini_batches * shape.passes,
        num_passes=shape.passes,
        flops=sum(max(cost for _, cost in parts) for parts in zip(*costs, strict=True)) * per_group,
    ), [[samples[i] for i in part] for rank in plan for part in rank if part]


def fullest(candidates: Sequence[list[StepSample]], shape: Shape, most_tokens: int) -> list[StepSample]:
    """The samples of the micro-batch that takes the most memory: of full size, and with the most keys to gather.

    Full is ``shape.max_tokens``, or ``most_tokens`` where a whole mini-batch has no more, or a longer sample that runs
    by itself; what is missing to it is filled up.
    """
    if shape.packing == "none":
        return max(candidates, key=lambda samples: len(samples) * max(each.num_tokens for each in samples))
    batches = [collate(samples, [1.0] * len(samples), shape.packing) for samples in candidates]
    sizes = [len(batch.tree.token_ids) for batch in batches]
    full = max(min(shape.max_tokens, most_tokens), *sizes)
    best = max(range(len(batches)), key=lambda k: _num_keys(batches[k]) + full - sizes[k])
    missing = full - sizes[best]
    if missing < 2:  # a sample has a prompt and a response
        return candidates[best]
    first = 1 + max(int(batches[best].tree.token_ids.max()), 0)
    return [*candidates[best], filler(missing, first, group=-1)]


def _num_keys(batch: MicroBatch) -> int:
    return sum(map(len, paths(cut(batch.tree.segments)[0])))


def _cost(samples: Sequence[StepSample], packing: Packing, flops: Flops) -> tuple[int, float]:
    """Tokens that are computed, and the operations of a forward pass."""
    if not samples:
        return 0, 0.0
    num_targets = sum(sample.num_response_tokens for sample in samples)
    if packing == "none":
        longest = max(sample.num_tokens for sample in samples)
        return len(samples) * longest, flops(len(samples) * longest, len(samples) * pairs_of(longest), num_targets)
    shared = [*_shared(samples, packing)]
    tokens = sum(length - common for length, common in shared)
    pairs = sum(pairs_of(length) - pairs_of(common) for length, common in shared)
    return tokens, flops(tokens, pairs, num_targets)


def _shared(samples: Sequence[StepSample], packing: Packing) -> Iterator[tuple[int, int]]:
    """Of each sample its length, and how much of it is there already."""
    for family in families_of(samples, packing):
        yield from ((leaf.length, leaf.shared) for leaf in family)
