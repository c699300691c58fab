"""Step samples laid into one tree, drawn as in ``types.MicroBatch``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_stepwise.algo.packing import Packing, collate, forests_of, tokens_of
from lit_stepwise.types import MicroBatch, StepSample


def row(prompt: list[int], response: list[int], **others: object) -> StepSample:
    size = len(response)
    sample = StepSample(
        prompt_ids=prompt,
        response_ids=response,
        response_mask=[True] * size,
        rollout_logprobs=[-0.125 * token for token in response],
        advantages=[float(prompt[0])] * size,
        reward=0.0,
        group=0,
        sample=0,
        turn=0,
        policy_version=0,
    )
    return replace(sample, **others)  # type: ignore[arg-type]


def test_collate_builds_the_drawing() -> None:
    # p0 = 10, p1 = 11, r0 = 12, r1 = 13
    short, long = row([10, 11], [12], advantages=[1.5]), row([10, 11], [12, 13], advantages=[-0.25, 0.75])
    batch = collate([short, long], [0.375, 0.0625])
    assert batch.tree.token_ids.tolist() == [10, 11, 12, 13]
    assert batch.sources.tolist() == [1, 2]
    assert batch.labels.tolist() == [12, 13]
    assert batch.targets.tolist() == [0, 0, 1]
    assert batch.turns.tolist() == [0, 1, 1]
    assert batch.rollout_logprobs.tolist() == [-1.5, -1.5, -1.625]
    assert batch.advantages.tolist() == [1.5, -0.25, 0.75]
    assert batch.weights.tolist() == [0.375, 0.0625, 0.0625]
    assert batch.temperatures.tolist() == [1.0, 1.0]
    assert batch.lengths == [3, 4]


def test_sampled_tokens_stand_sample_by_sample_whatever_their_order_in_the_tree() -> None:
    batch = collate([row([30], [31]), row([20], [21, 22])], [1.0, 2.0])
    assert batch.labels[batch.targets].tolist() == [31, 21, 22]
    assert batch.tree.token_ids[batch.sources][batch.targets].tolist() == [30, 20, 21]
    assert batch.advantages.tolist() == [30.0, 20.0, 20.0]
    assert batch.weights.tolist() == [1.0, 2.0, 2.0]
    assert batch.turns.tolist() == [0, 1, 1]
    assert batch.lengths == [2, 3]


def test_only_sampled_tokens_are_targets_and_each_has_numbers_of_its_own() -> None:
    whole = row(
        [10],
        [11, 12, 13, 14],
        response_mask=[True, False, False, True],
        advantages=[0.25, 7.0, 8.0, -0.5],
        old_logprobs=[-3.0, -9.0, -9.0, -4.0],
    )
    batch = collate([whole, row([10, 11], [22])], [0.5, 0.125])
    assert batch.tree.token_ids.tolist() == [10, 11, 12, 13, 14, 22]
    assert batch.labels.tolist() == [11, 14, 22]
    assert batch.sources.tolist() == [0, 3, 1]
    assert batch.rollout_logprobs.tolist() == [-1.375, -1.75, -2.75]
    assert batch.old_logprobs.tolist() == [-3.0, -4.0, -2.75]  # the second sample has none but the rollout's
    assert batch.advantages.tolist() == [0.25, -0.5, 10.0]
    assert batch.weights.tolist() == [0.5, 0.5, 0.125]
    assert batch.turns.tolist() == [0, 0, 1]


def test_a_token_may_be_prompt_to_one_sample_and_target_to_another() -> None:
    first, second = row([5, 6], [7]), row([5, 6, 7, 8], [9])
    batch = collate([second, first], [1.0, 1.0])
    assert batch.tree.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.labels[batch.targets].tolist() == [9, 7]
    assert batch.sources[batch.targets].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("packing", "num_nodes"),
    [
        ("tree", 7),  # 1 2 with 3 4 and 5 below it, and 1 9 at another temperature
        ("trajectory", 9),  # 1 2 3 4 and 1 2 5 and 1 9 of three attempts
        ("none", 12),
    ],
)
def test_packing_says_who_shares(packing: Packing, num_nodes: int) -> None:
    samples = [
        row([1, 2], [3]),
        row([1, 2, 3], [4], turn=1),
        row([1, 2], [5], sample=1),
        row([1], [9], sample=2, temperature=0.5),
    ]
    batch = collate(samples, [1.0] * 4, packing)
    assert len(batch.tree.token_ids) == num_nodes
    assert batch.labels[batch.targets].tolist() == [3, 4, 5, 9]
    assert batch.temperatures[batch.targets].tolist() == [1.0, 1.0, 1.0, 0.5]


def test_trajectories_of_different_tasks_are_different() -> None:
    samples = [row([1], [2], group=0, sample=1), row([1], [2], group=1, sample=1), row([1], [2], group=1, sample=1)]
    first, second, third = forests_of(samples, "trajectory")
    assert first != second == third


def test_the_tokens_of_a_sample_are_its_prompt_and_response() -> None:
    assert tokens_of(row([3, 1], [2, 4, 5])).tolist() == [3, 1, 2, 4, 5]


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=4)
rows = st.builds(row, tokens, tokens, sample=st.integers(0, 2), temperature=st.sampled_from([1.0, 0.5]))


@given(st.lists(rows, min_size=1, max_size=6), st.sampled_from(["tree", "trajectory", "none"]))
def test_every_sampled_token_is_read_where_its_own_context_ends(samples: list[StepSample], packing: Packing) -> None:
    samples = [replace(each, temperature=1.0) for each in samples] if packing == "trajectory" else samples
    batch = collate(samples, [float(i) for i in range(len(samples))], packing)
    expected = [
        ([*each.prompt_ids, *each.response_ids[:k]], token, each.temperature)
        for each in samples
        for k, token in enumerate(each.response_ids)
    ]
    labels, temperatures = batch.labels.tolist(), batch.temperatures.tolist()
    found = [(_context(batch, int(batch.sources[k])), labels[k], temperatures[k]) for k in batch.targets.tolist()]
    assert found == expected
    assert batch.weights.tolist() == [float(i) for i, each in enumerate(samples) for _ in each.response_ids]
    assert sorted(set(batch.targets.tolist())) == list(range(len(batch.labels)))  # no target that nobody asks for


def _context(batch: MicroBatch, node: int) -> list[int]:
    """All that the node sees."""
    seen = [k for k in range(node + 1) if node < batch.tree.ends[k]]
    return [int(batch.tree.token_ids[k]) for k in seen]


def test_numbers_are_float32_whole_ones_and_a_trainer_of_bfloat16_notwithstanding() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        batch = collate([row([1], [2, 3], advantages=[0, 1])], [1])
    finally:
        torch.set_default_dtype(torch.float32)
    names = ("rollout_logprobs", "old_logprobs", "advantages", "weights", "temperatures")
    assert {getattr(batch, name).dtype for name in names} == {torch.float32}


@pytest.mark.parametrize("packing", ["tree", "trajectory", "none"])
def test_an_empty_micro_batch_has_a_node_to_forward_and_no_targets(packing: Packing) -> None:
    batch = collate([], [], packing)
    assert batch.tree.token_ids.shape == (1,)
    names = ("sources", "labels", "temperatures", "targets", "turns", "old_logprobs", "advantages", "weights")
    assert {getattr(batch, name).shape for name in names} == {(0,)}
    assert {getattr(batch, name).dtype for name in ("sources", "labels", "targets", "turns")} == {torch.int64}


def test_a_micro_batch_refuses_values_that_do_not_fit_its_targets() -> None:
    batch = collate([row([1], [2, 3]), row([1], [2])], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"targets has shape \(3,\) but advantages \(1,\)"):
        replace(batch, advantages=torch.zeros(1))
    with pytest.raises(ValueError, match=r"labels has shape \(2,\) but sources \(3,\)"):
        replace(batch, sources=torch.zeros(3))


def test_a_micro_batch_moves_as_a_whole() -> None:
    batch = collate([row([1], [2, 3])], [1.0]).to("meta")
    assert {getattr(batch, name).device.type for name in ("sources", "targets", "weights")} == {"meta"}
    assert batch.tree.ends.device.type == "meta"
    assert batch.lengths == [3]
