"""Cutting step samples: an iteration into mini-batches, a mini-batch into micro-batches, equal on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, count, islice, pairwise
from typing import NamedTuple

import numpy as np

from lit_stepwise.algo.flops import Flops, pairs_of
from lit_stepwise.algo.packing import Packing, forests_of, tokens_of
from lit_stepwise.algo.tree import depth_first
from lit_stepwise.types import StepSample

Plan = list[list[list[int]]]
"""``plan[rank][round]``: indices of the samples that this rank forwards together in this round."""

_ROUND_TOKENS = 512
"""What a round costs beside its FLOPs, in tokens. Sharded weights are gathered once in it, 2 bytes each: at 450 GB/s
that takes as long as 1000 tokens at 450 TFLOP/s, half of it hidden behind them. Launching kernels costs no less."""
_FINER = 0.92
"""What a family is cut to next, of the largest run that it is cut into."""
_NUM_CUTS = 32
"""Tried for one number of rounds."""
_NUM_ROUNDS = 4
"""Numbers of rounds that are tried, of those that all runs fit into."""


class Leaf(NamedTuple):
    """A sample among those that it may share tokens with, in the order of a walk through their tree."""

    sample: int
    """Its index."""
    length: int
    """In tokens."""
    shared: int
    """How many first tokens it has in common with the one before; 0 for the first."""
    num_targets: int


class Run(NamedTuple):
    """Samples that are forwarded together because they share tokens."""

    flops: float
    tokens: int
    """Nodes of their tree."""
    samples: list[int]
    """Their indices."""


class _MicroBatch(NamedTuple):
    flops: float
    families: list[int]
    """Of its runs, the costliest first."""
    samples: list[int]


def cut_at_groups(samples: Sequence[StepSample], num_parts: int) -> list[list[StepSample]]:
    """``num_parts`` mini-batches, none of which splits a group; with fewer groups than parts some are empty."""
    groups = sorted({sample.group for sample in samples})
    part_of = {group: position * num_parts // len(groups) for position, group in enumerate(groups)}
    parts: list[list[StepSample]] = [[] for _ in range(num_parts)]
    for sample in samples:
        parts[part_of[sample.group]].append(sample)
    return parts


def plan_micro_batches(
    samples: Sequence[StepSample], max_tokens: int, flops: Flops, packing: Packing = "tree", world_size: int = 1
) -> Plan:
    """Which samples each rank forwards together, so that a mini-batch takes the least time; equal input, equal plan.

    In a round every rank has one micro-batch, which may be empty, and all wait for the costliest. A micro-batch stays
    within ``max_tokens``: nodes of its tree, or rows x longest row where ``packing`` is none. A sample that is longer
    runs with nothing but prefixes of itself. What samples share is counted within a group (or trajectory) only, so a
    micro-batch may come out smaller than planned: system prompts, and runs of one group that met again.
    """
    if packing == "none":
        return _plan_rows([sample.num_tokens for sample in samples], max_tokens, world_size)
    families = [_Family(leaves, max_tokens, flops) for leaves in families_of(samples, packing)]
    best: list[_MicroBatch] = []
    least = float("inf")
    per_round = flops(_ROUND_TOKENS, 0, 0)
    for attempts in islice(_packings(families, max_tokens, world_size), _NUM_ROUNDS):
        for micro_batches in attempts:
            costliest = micro_batches[::world_size]
            if _total(micro_batches) / world_size + per_round * len(costliest) >= least:
                break  # finer cuts only compute more
            cost = _total(costliest) + per_round * len(costliest)
            if cost < least:
                best, least = micro_batches, cost
    return _deal([sorted(each.samples) for each in best], world_size)


# ---- cutting the tree


def families_of(samples: Sequence[StepSample], packing: Packing) -> list[list[Leaf]]:
    """Samples of one group that may share tokens, and as packing has it of one trajectory; families share nothing."""
    forests = [(sample.group, forest) for sample, forest in zip(samples, forests_of(samples, packing), strict=True)]
    order, shared = depth_first([tokens_of(sample) for sample in samples], forests)
    families: dict[object, list[Leaf]] = {}
    for i, common in zip(order, shared, strict=True):
        leaf = Leaf(i, samples[i].num_tokens, common, samples[i].num_response_tokens)
        families.setdefault(forests[i], []).append(leaf)
    return list(families.values())


def cut(family: Sequence[Leaf], max_tokens: int, flops: Flops) -> list[Run]:
    """Into runs of at most ``max_tokens`` nodes (a longer sample with its prefixes is one too) that cost the least.

    Least among all cuts into neighbours, of the order given and of one in which siblings that fit together stand side
    by side.
    """
    runs = _cheapest_runs(family, max_tokens, flops)
    if len(runs) == 1:
        return runs
    return min(runs, _cheapest_runs(_regrouped(family, max_tokens), max_tokens, flops), key=_total)


def _cheapest_runs(family: Sequence[Leaf], max_tokens: int, flops: Flops) -> list[Run]:
    """By dynamic programming: a cut costs the prefix that its two sides share, which both compute."""
    nodes = [0, *accumulate(leaf.length - leaf.shared for leaf in family)]
    extra = [0.0]  # up to each cut: the least that is computed twice because of it and those before
    starts: list[int] = []  # of the last run, if leaves from here on are left out
    start = 0
    for stop, leaf in enumerate(family, 1):
        while nodes[stop] - nodes[start] + family[start].shared > max(max_tokens, leaf.length):
            start += 1
        starts.append(min(range(start, stop), key=extra.__getitem__))
        shared = family[stop].shared if stop < len(family) else 0
        extra.append(extra[starts[-1]] + flops(shared, pairs_of(shared), 0))
    bounds = [len(family)]
    while bounds[-1]:
        bounds.append(starts[bounds[-1] - 1])
    return [_run(family[start:stop], flops) for start, stop in pairwise(reversed(bounds))]


def _run(leaves: Sequence[Leaf], flops: Flops) -> Run:
    shared = [0, *(leaf.shared for leaf in leaves[1:])]
    tokens = sum(leaf.length for leaf in leaves) - sum(shared)
    pairs = sum(pairs_of(leaf.length) for leaf in leaves) - sum(map(pairs_of, shared))
    num_targets = sum(leaf.num_targets for leaf in leaves)
    return Run(flops(tokens, pairs, num_targets), tokens, [leaf.sample for leaf in leaves])


def _regrouped(family: Sequence[Leaf], max_tokens: int) -> list[Leaf]:
    """In the order of another walk through the same tree: at every fork, branches that fit together come together."""
    shared = [leaf.shared for leaf in family]
    order = _walk([leaf.length for leaf in family], shared, range(len(family)), max_tokens)[1]
    between = (min(shared[min(i, j) + 1 : max(i, j) + 1]) for i, j in pairwise(order))
    return [family[i]._replace(shared=common) for i, common in zip(order, [0, *between], strict=True)]


def _walk(lengths: Sequence[int], shared: Sequence[int], leaves: range, max_tokens: int) -> tuple[int, list[int]]:
    """Nodes from the root to these neighbouring leaves, and their new order."""
    if len(leaves) == 1:
        return lengths[leaves[0]], list(leaves)
    fork = min(shared[i] for i in leaves[1:])
    bounds = [leaves.start, *(i for i in leaves[1:] if shared[i] == fork), leaves.stop]
    branches = [_walk(lengths, shared, range(*ends), max_tokens) for ends in pairwise(bounds)]
    taken: list[int] = []
    orders: list[list[int]] = []
    # first fit decreasing, but first of all what ends at the fork
    for nodes, order in sorted(branches, key=lambda branch: (branch[0] > fork, -branch[0])):
        k = next((k for k, others in enumerate(taken) if others + nodes - fork <= max_tokens), None)
        if k is None:
            taken.append(nodes)
            orders.append(order)
        else:
            taken[k] += nodes - fork
            orders[k] += order
    return fork + sum(nodes - fork for nodes, _ in branches), [i for order in orders for i in order]


class _Family:
    """What shares nothing with others, and ever finer cuts of it."""

    def __init__(self, leaves: Sequence[Leaf], max_tokens: int, flops: Flops) -> None:
        self.leaves = leaves
        self.flops = flops
        self.longest = max(leaf.length for leaf in leaves)
        self.cuts = [cut(leaves, max_tokens, flops)]

    def has_cut(self, level: int) -> bool:
        """Made when asked for; the last has no run that is larger than the longest sample."""
        if level == len(self.cuts):
            largest = max(run.tokens for run in self.cuts[-1])
            if largest > self.longest:
                self.cuts.append(cut(self.leaves, int(_FINER * largest), self.flops))
        return level < len(self.cuts)


# ---- dealing the runs out


def _packings(families: Sequence[_Family], max_tokens: int, world_size: int) -> Iterator[Iterator[list[_MicroBatch]]]:
    """For ever more rounds, from the fewest that all runs fit into, what ``_ever_finer`` gives."""
    tokens = sum(min(run.tokens, max_tokens) for family in families for run in family.cuts[0])
    for num_rounds in count(max(1, -(-tokens // (world_size * max_tokens)))):
        attempts = _ever_finer(families, num_rounds * world_size, max_tokens)
        first = next(attempts, None)
        if first is not None:
            yield chain([first], attempts)


def _ever_finer(families: Sequence[_Family], num_micro_batches: int, max_tokens: int) -> Iterator[list[_MicroBatch]]:
    """So many micro-batches, the costliest first; then again, with a finer cut of what is in that one.

    Nothing where the runs do not fit in, which more rounds mend at less cost than finer cuts.
    """
    levels = [0] * len(families)
    for _ in range(_NUM_CUTS):
        runs = [(run, k) for k, level in enumerate(levels) for run in families[k].cuts[level]]
        runs.sort(key=lambda each: (-each[0].flops, -each[0].tokens))
        micro_batches = _pack(runs, num_micro_batches, max_tokens)
        if micro_batches is None:
            return
        yield micro_batches
        finer = next((k for k in micro_batches[0].families if families[k].has_cut(levels[k] + 1)), None)
        if finer is None:
            return
        levels[finer] += 1


def _pack(runs: Sequence[tuple[Run, int]], num_micro_batches: int, max_tokens: int) -> list[_MicroBatch] | None:
    """Longest processing time first: each run goes where there is least so far. None where that leaves one over."""
    flops, tokens = np.zeros(num_micro_batches), np.zeros(num_micro_batches, np.int64)
    members: list[list[int]] = [[] for _ in range(num_micro_batches)]
    families: list[list[int]] = [[] for _ in range(num_micro_batches)]
    for run, family in runs:
        full = (tokens > 0) & (tokens + run.tokens > max_tokens)
        k = int(np.where(full, np.inf, flops).argmin())
        if full[k]:
            return None
        flops[k] += run.flops
        tokens[k] += run.tokens
        members[k] += run.samples
        families[k].append(family)
    return sorted(map(_MicroBatch, flops.tolist(), families, members), key=lambda each: -each.flops)


def _deal(micro_batches: Sequence[list[int]], world_size: int) -> Plan:
    """Round by round, back and forth, so that ranks which do not wait for each other have like sums too."""
    plan: Plan = [[] for _ in range(world_size)]
    for position, micro_batch in enumerate(micro_batches):
        turn, seat = divmod(position, world_size)
        plan[seat if turn % 2 == 0 else world_size - 1 - seat].append(micro_batch)
    return plan


def _plan_rows(lengths: Sequence[int], max_tokens: int, world_size: int) -> Plan:
    """Longest first, so that samples of like length share a micro-batch and little is padded."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    batches.sort(key=lambda batch: -len(batch) * lengths[batch[0]])
    missing = -len(batches) % world_size if batches else world_size
    return _deal(batches + [[] for _ in range(missing)], world_size)


def _total(parts: Sequence[Run] | Sequence[_MicroBatch]) -> float:
    return sum(part.flops for part in parts)
