"""Cutting an iteration into mini-batches, and planning who forwards what of a mini-batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.workloads import SHAPES, workload
from lit_stepwise.algo.flops import Flops
from lit_stepwise.algo.microbatches import Leaf, Plan, Run, cut, cut_at_groups, families_of, plan_micro_batches
from lit_stepwise.algo.packing import Packing, collate
from lit_stepwise.types import StepSample

FLOPS = Flops(per_token=10.0, per_pair=3.0, per_target=0.5)
TOKENS = Flops(per_token=1.0, per_pair=0.0, per_target=0.0)


def row(tokens: Sequence[int], group: int = 0, sample: int = 0, response: int = 1, heat: float = 1.0) -> StepSample:
    """The last ``response`` tokens are sampled."""
    return StepSample(
        prompt_ids=tokens[:-response],
        response_ids=tokens[-response:],
        response_mask=[True] * response,
        rollout_logprobs=[-1.0] * response,
        advantages=[1.0] * response,
        reward=0.0,
        group=group,
        sample=sample,
        turn=0,
        policy_version=0,
        temperature=heat,
    )


def alone(*lengths: int) -> list[StepSample]:
    """A group for each length, which share nothing."""
    return [row([100 + group] * length, group) for group, length in enumerate(lengths)]


def cost_of(samples: Sequence[StepSample], members: Sequence[int], flops: Flops, packing: Packing = "tree") -> float:
    """Counted in the very micro-batch."""
    batch = collate([samples[i] for i in members], [1.0] * len(members), packing)
    pairs = int(batch.tree.positions.sum()) + len(batch.tree.positions)
    return flops(len(batch.tree.token_ids), pairs, len(batch.targets)) if members else 0.0


def cost_of_plan(samples: Sequence[StepSample], plan: Plan, flops: Flops) -> float:
    """All ranks wait in every round for the costliest."""
    return sum(max(cost_of(samples, members, flops) for members in a_round) for a_round in zip(*plan, strict=True))


def members_of(runs: Sequence[Run]) -> list[list[int]]:
    return [run.samples for run in runs]


# ---- cutting


# 1 2 3 4 - 5 - 6        sample 0
#         |   \ 7 8      sample 1
#         \ 9            sample 2
DRAWN = [row([1, 2, 3, 4, 5, 6], response=2), row([1, 2, 3, 4, 5, 7, 8], response=3), row([1, 2, 3, 4, 9])]


def test_a_family_is_its_samples_in_the_order_of_a_walk_with_what_each_shares_with_the_one_before() -> None:
    shuffled = [DRAWN[2], DRAWN[0], DRAWN[1], row([1, 2], group=7)]
    assert families_of(shuffled, "tree") == [[Leaf(1, 6, 0, 2), Leaf(2, 7, 5, 3), Leaf(0, 5, 4, 1)], [Leaf(3, 2, 0, 1)]]


def test_the_cut_that_computes_least_again_is_the_one_high_up_in_the_tree() -> None:
    (family,) = families_of(DRAWN, "tree")
    # 9 nodes do not fit; 0 and 1 apart from 2 repeats 1 2 3 4, while 0 apart from 1 and 2 would repeat 5, too
    together, apart = cut(family, 8, FLOPS)
    assert together == Run(10 * 8 + 3 * (21 + 6 + 7) + 0.5 * 5, 8, [0, 1])
    assert apart == Run(10 * 5 + 3 * 15 + 0.5 * 1, 5, [2])
    assert members_of(cut(family, 9, FLOPS)) == [[0, 1, 2]]
    assert members_of(cut(family, 6, FLOPS)) == [[0], [1], [2]]


def test_siblings_that_fit_together_go_together_whatever_stands_between_them() -> None:
    # below a prompt of 4: branches of 4, 6 and 2 tokens, in this order
    samples = [row([1, 2, 3, 4, *[branch] * length]) for branch, length in ((5, 4), (6, 6), (7, 2))]
    (family,) = families_of(samples, "tree")
    assert sorted(map(sorted, members_of(cut(family, 10, FLOPS)))) == [[0, 2], [1]]
    # and a sample that ends at the fork costs nothing more, be it with any of them
    (family,) = families_of([*samples, row([1, 2, 3, 4])], "tree")
    assert sorted(run.tokens for run in cut(family, 10, FLOPS)) == [10, 10]


# sizes of branches below a prompt of 4, in the order of a walk, and which of them 14 nodes hold
@pytest.mark.parametrize(
    ("sizes", "together"),
    [
        ((8, 7, 3, 2), [[0, 3], [1, 2]]),  # the largest first: 2 and 3 together would leave 7 and 8 alone
        ((5, 6, 2, 5, 2), [[0, 3], [1, 2, 4]]),  # three of them, whose prompt counts once
    ],
)
def test_the_largest_branch_is_put_first_and_others_where_they_fit(sizes: list[int], together: list[list[int]]) -> None:
    (family,) = families_of([row([1, 2, 3, 4, *[5 + k] * size]) for k, size in enumerate(sizes)], "tree")
    assert sorted(map(sorted, members_of(cut(family, 14, FLOPS)))) == together


def test_siblings_are_put_together_below_a_deeper_fork_as_well() -> None:
    samples = [row([1, 2, 3, *[branch] * length]) for branch, length in ((5, 4), (6, 6), (7, 2))]
    (family,) = families_of([*samples, row([1, 9, 9, 9, 9, 9, 9, 9])], "tree")
    assert sorted(map(sorted, members_of(cut(family, 9, FLOPS)))) == [[0, 2], [1], [3]]


def test_a_subtree_goes_with_others_if_all_of_it_fits() -> None:
    # 6 below 2 2 2 2 2 goes with 3 3, to 11; 5 5 5 and 6 6 6 together would not
    samples = [row([1, 1, 1, *[2] * 5, 5]), row([1, 1, 1, *[2] * 5, 6, 6, 6]), row([1, 1, 1, 3, 3])]
    (family,) = families_of(samples, "tree")
    assert sorted(map(sorted, members_of(cut(family, 11, FLOPS)))) == [[0, 2], [1]]


def test_what_ends_at_a_fork_stays_in_front_of_a_branch_beyond_the_budget() -> None:
    siblings = [row([1, 2, 3, 4, *[branch] * length]) for branch, length in ((5, 4), (6, 6), (7, 2))]
    samples = [*siblings, row([1, 9]), row([1, 9, *[5] * 12]), row([1, 9, *[6] * 12])]
    (family,) = families_of(samples, "tree")
    assert sorted(map(sorted, members_of(cut(family, 10, FLOPS)))) == [[0, 2], [1], [3, 4], [5]]


def test_a_sample_beyond_the_budget_runs_with_nothing_but_prefixes_of_itself() -> None:
    samples = [row([1, 2]), row([1, 2, 3, 4, 5, 6, 7]), row([1, 2, 3, 4]), row([1, 2, 9])]
    (family,) = families_of(samples, "tree")
    assert members_of(cut(family, 5, FLOPS)) == [[0, 2, 1], [3]]
    assert plan_micro_batches(samples, 5, FLOPS) == [[[0, 1, 2], [3]]]


small = st.lists(st.integers(0, 2), min_size=1, max_size=7)


@settings(deadline=None)
@given(st.lists(small, min_size=1, max_size=6), st.integers(1, 12))
def test_no_cut_between_neighbours_is_cheaper(sequences: list[list[int]], max_tokens: int) -> None:
    samples = [row(tokens) for tokens in sequences]
    (family,) = families_of(samples, "tree")
    order = [leaf.sample for leaf in family]
    size, costs = len(order), []
    for marks in (marks for n in range(size) for marks in combinations(range(1, size), n)):
        runs = [order[start:stop] for start, stop in pairwise([0, *marks, size])]
        if all(_fits(samples, run, max_tokens) for run in runs):
            costs.append(sum(cost_of(samples, run, FLOPS) for run in runs))
    found = cut(family, max_tokens, FLOPS)
    assert sum(run.flops for run in found) <= min(costs)
    assert sorted(i for run in found for i in run.samples) == list(range(size))
    for run in found:
        assert _fits(samples, run.samples, max_tokens)
        assert run.flops == cost_of(samples, run.samples, FLOPS)
        assert run.tokens == _num_nodes(samples, run.samples)


def _num_nodes(samples: Sequence[StepSample], members: Sequence[int], packing: Packing = "tree") -> int:
    return len(collate([samples[i] for i in members], [1.0] * len(members), packing).tree.token_ids)


def _fits(samples: Sequence[StepSample], members: Sequence[int], max_tokens: int, packing: Packing = "tree") -> bool:
    longest = max(samples[i].num_tokens for i in members)
    return _num_nodes(samples, members, packing) <= max(max_tokens, longest)


# ---- planning


def test_what_fits_one_rank_is_one_micro_batch() -> None:
    assert plan_micro_batches([*DRAWN, *alone(3)], 12, FLOPS) == [[[0, 1, 2, 3]]]


def test_like_costs_stand_side_by_side_and_ranks_take_turns_at_the_costlier() -> None:
    assert plan_micro_batches(alone(10, 4, 9, 5), 10, FLOPS, world_size=2) == [[[0], [1]], [[2], [3]]]


def test_a_costly_run_goes_where_there_is_least() -> None:
    # 9 | 8, then 5 to 8, 4 to 9 and 2 to one of those that have 13 now
    plan = plan_micro_batches(alone(4, 9, 5, 8, 2), 100, TOKENS, world_size=2)
    assert sorted(map(sorted, (batch for rank in plan for batch in rank))) == [[0, 1, 4], [2, 3]]


def test_attention_counts_besides_tokens() -> None:
    # 8 tokens see 36, and 4 + 4 tokens see 10 + 10
    attention = Flops(per_token=0.0, per_pair=1.0, per_target=0.0)
    plan = plan_micro_batches(alone(8, 4, 4, 4), 100, attention, world_size=2)
    assert plan == [[[0]], [[1, 2, 3]]]


def test_targets_count_besides_tokens() -> None:
    samples = [row([group] * 5, group, response=size) for group, size in enumerate((4, 1, 2, 1))]
    head = Flops(per_token=0.0, per_pair=0.0, per_target=1.0)
    assert plan_micro_batches(samples, 100, head, world_size=2) == [[[0]], [[1, 2, 3]]]


def test_a_group_is_cut_for_ranks_that_would_have_nothing_to_do() -> None:
    prompt = [1] * 1000
    branches = [row(prompt + [2 + branch] * 3000) for branch in range(4)]
    assert plan_micro_batches(branches, 50_000, TOKENS, world_size=1) == [[[0, 1, 2, 3]]]
    assert plan_micro_batches(branches, 50_000, TOKENS, world_size=2) == [[[0, 1]], [[2, 3]]]
    plan = plan_micro_batches(branches, 50_000, TOKENS, world_size=4)
    assert sorted(batch for rank in plan for batch in rank) == [[0], [1], [2], [3]]


def test_only_the_group_that_makes_others_wait_is_cut() -> None:
    large = [row([1] * 100 + [2 + branch] * 4000, sample=branch) for branch in range(3)]
    little = [row([9] * 100 + [2 + branch] * 1000, group=1) for branch in range(3)]
    plan = plan_micro_batches([*large, *little], 50_000, TOKENS, world_size=2)
    # 8100 and 4100 + 3100; whole, it would have been 12100 and 3100
    assert sorted(map(len, (batch for rank in plan for batch in rank))) == [2, 4]
    assert cost_of_plan([*large, *little], plan, TOKENS) == 8100


def test_it_is_not_the_largest_group_that_is_cut_but_one_that_others_wait_for() -> None:
    most = [row([1] * 800 + [2 + branch] * 100) for branch in range(2)]
    less = [row([1] * 10 + [2] * 490, group=1), row([1] * 10 + [3] * 110, group=1)]
    samples = [*most, *less, row([1] * 600, group=2)]
    plan = plan_micro_batches(samples, 50_000, TOKENS, world_size=2)
    # 1000 and 610 + 600, if none is cut; now 1000 + 120 and 600 + 500
    assert sorted(batch for rank in plan for batch in rank) == [[0, 1, 3], [2, 4]]


@pytest.mark.parametrize(("scale", "num_rounds"), [(100, 1), (1000, 2)])
def test_a_round_more_has_to_save_more_than_it_costs(scale: int, num_rounds: int) -> None:
    # two ranks: 17 in one round, or 9 + 7 in two, and a round costs as much as 512 tokens
    samples = alone(*(scale * length for length in (7, 6, 9, 5, 4, 1)))
    plan = plan_micro_batches(samples, 10**6, TOKENS, world_size=2)
    assert [len(batches) for batches in plan] == [num_rounds] * 2
    assert cost_of_plan(samples, plan, TOKENS) == (17 if num_rounds == 1 else 9 + 7) * scale


def test_trajectories_share_where_packing_says_so_alone() -> None:
    prompt = [1] * 6
    samples = [row([*prompt, 2, turn], sample=attempt) for attempt, turn in ((0, 3), (1, 4), (0, 5), (1, 6))]
    assert plan_micro_batches(samples, 11, FLOPS, "tree") == [[[0, 1, 2, 3]]]
    assert plan_micro_batches(samples, 11, FLOPS, "trajectory") == [[[0, 2], [1, 3]]]
    assert [len(family) for family in families_of(samples, "trajectory")] == [2, 2]
    assert sum(leaf.shared for family in families_of(samples, "trajectory") for leaf in family) == 7 + 7


def test_what_is_read_at_another_temperature_shares_nothing() -> None:
    samples = [row([1, 1, 1, 2]), row([1, 1, 1, 3], heat=0.5), row([1, 1, 1, 4])]
    assert [[leaf.sample for leaf in family] for family in families_of(samples, "tree")] == [[0, 2], [1]]


def test_ranks_without_work_get_empty_micro_batches() -> None:
    for packing in ("tree", "trajectory", "none"):
        assert plan_micro_batches(alone(5), 10, FLOPS, packing, world_size=3) == [[[0]], [[]], [[]]]
        assert plan_micro_batches([], 10, FLOPS, packing, world_size=2) == [[[]], [[]]]


def test_beyond_the_budget_one_round_is_enough() -> None:
    assert plan_micro_batches(alone(50, 40), 10, FLOPS, world_size=2) == [[[0]], [[1]]]


samples_drawn = st.lists(
    st.builds(row, small, group=st.integers(0, 3), sample=st.integers(0, 1)), min_size=1, max_size=14
)


@settings(deadline=None)
@given(samples_drawn, st.integers(1, 30), st.integers(1, 5), st.sampled_from(["tree", "trajectory"]))
def test_a_plan_loses_nothing_and_keeps_to_its_budget(
    samples: list[StepSample], max_tokens: int, world_size: int, packing: Packing
) -> None:
    plan = plan_micro_batches(samples, max_tokens, FLOPS, packing, world_size)
    assert len(plan) == world_size
    assert len({len(batches) for batches in plan}) == 1
    batches = [batch for rank in plan for batch in rank]
    assert sorted(i for batch in batches for i in batch) == list(range(len(samples)))
    assert all(_fits(samples, batch, max_tokens, packing) for batch in batches if batch)
    assert plan_micro_batches(samples, max_tokens, FLOPS, packing, world_size) == plan


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("template", ["append", "strip"])
def test_the_order_of_samples_does_not_change_the_cost(name: str, template: str) -> None:
    samples = workload(name, template, groups=6, seed=3, shrink=40, vocabulary=1000)  # type: ignore[arg-type]
    shuffled = samples.copy()
    random.Random(3).shuffle(shuffled)
    costs = [
        cost_of_plan(each, plan_micro_batches(each, 800, FLOPS, world_size=3), FLOPS) for each in (samples, shuffled)
    ]
    assert costs[0] == pytest.approx(costs[1], rel=1e-12)


@pytest.mark.parametrize("template", ["append", "strip"])
def test_a_plan_is_near_what_could_be_had_without_a_budget(template: str) -> None:
    samples = workload("B", template, groups=24, seed=3, shrink=40, vocabulary=100_000)  # type: ignore[arg-type]
    # a round costs as much as the 512 tokens of full size
    flops = Flops(per_token=1.0, per_pair=0.01, per_target=0.1)
    whole = sum(run.flops for family in families_of(samples, "tree") for run in cut(family, 10**9, flops))
    for max_tokens in (32_768 // 40, 65_536 // 40):
        plan = plan_micro_batches(samples, max_tokens, flops, world_size=4)
        assert cost_of_plan(samples, plan, flops) < 1.1 * whole / 4


# ---- rows


def test_rows_keep_to_their_budget_and_lose_nothing() -> None:
    draw = random.Random(3)
    samples = alone(*(draw.randint(1, 50) for _ in range(200)), 130)  # one is longer than the budget
    for world_size in (1, 2, 3):
        plan = plan_micro_batches(samples, 120, FLOPS, "none", world_size)
        assert len({len(batches) for batches in plan}) == 1
        batches = [batch for rank in plan for batch in rank]
        assert sorted(i for batch in batches for i in batch) == list(range(201))
        assert [200] in batches
        rows = [[samples[i].num_tokens for i in batch] for batch in batches if batch not in ([], [200])]
        assert all(len(lengths) * max(lengths) <= 120 for lengths in rows)


def test_rows_of_like_length_go_together_and_the_costliest_to_different_ranks() -> None:
    plan = plan_micro_batches(alone(3, 9, 4, 10), 20, FLOPS, "none", 2)
    assert plan == [[[3, 1]], [[2, 0]]]  # 10 + 9 padded to 20, 4 + 3 padded to 8
    assert plan_micro_batches(alone(12, 9, 9), 20, FLOPS, "none") == [[[1, 2], [0]]]  # 18 before 12
    # four micro-batches that cost 10, 9, 8, 7: dealt out there and back, so that both ranks have 17
    assert plan_micro_batches(alone(10, 9, 8, 7), 10, FLOPS, "none", 2) == [[[0], [3]], [[1], [2]]]


# ---- mini-batches


def test_mini_batches_never_split_a_group() -> None:
    samples = [row([1, 2], group=group) for group in (4, 4, 9, 1, 9, 6, 1)]
    parts = cut_at_groups(samples, 2)
    assert [[each.group for each in part] for part in parts] == [[4, 4, 1, 1], [9, 9, 6]]


def test_more_mini_batches_than_groups_leave_some_empty() -> None:
    assert [len(part) for part in cut_at_groups([row([1, 2], group=3)], 3)] == [1, 0, 0]
