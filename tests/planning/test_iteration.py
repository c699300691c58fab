"""What an iteration plays and trains, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lit_stepwise.algo.flops import Flops, pairs_of
from lit_stepwise.algo.packing import collate
from lit_stepwise.planning.attempts import Lengths, step_samples, worst_lengths
from lit_stepwise.planning.iteration import Shape, fullest, iteration
from lit_stepwise.types import Limits

LIMITS = Limits(max_prompt_tokens=11, max_context_tokens=60, max_new_tokens=9, max_turns=3)
LENGTHS = Lengths(prompt=10, response=7, thought=4, observation=2, turns=3)
FLOPS = Flops(per_token=1000.0, per_pair=10.0, per_target=100.0)
SHAPE = Shape(
    limits=LIMITS, history="append", rows="step", samples_per_task=2, tasks_per_iteration=3, mini_batches=1, passes=1,
    packing="tree", max_tokens=1000, num_shares=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("history", "prompts"),
    [
        ("append", [10, 10 + 7 + 2, 10 + 2 * (7 + 2)]),
        ("keep_think", [10, 10 + 7 + 2, 10 + 2 * (7 + 2)]),
        ("strip_think", [10, 10 + 3 + 2, 10 + 2 * (3 + 2)]),  # of 7 sampled tokens 3 are no thought
    ],
)
def test_a_prompt_holds_what_the_history_keeps_of_earlier_turns(history, prompts):
    turns = step_samples(LENGTHS, LIMITS, history, "step", 1, 1)
    assert [len(turn.prompt_ids) for turn in turns] == prompts
    assert [len(turn.response_ids) for turn in turns] == [7, 7, 7]


def test_prompts_continue_the_very_tokens_where_nothing_is_stripped():
    first, second, _ = step_samples(LENGTHS, LIMITS, "append", "step", 1, 1)
    assert [*second.prompt_ids][:17] == [*first.prompt_ids, *first.response_ids]
    first, second, _ = step_samples(LENGTHS, LIMITS, "strip_think", "step", 1, 1)
    assert [*second.prompt_ids][:13] == [*first.prompt_ids, *first.response_ids[4:]]


def test_a_context_that_is_full_cuts_the_response_and_ends_the_attempt():
    tight = replace(LIMITS, max_context_tokens=31)
    turns = step_samples(LENGTHS, tight, "append", "step", 1, 1)
    assert [turn.num_tokens for turn in turns] == [17, 26, 31]
    assert len(turns[-1].response_ids) == 3
    turns = step_samples(LENGTHS, replace(tight, max_context_tokens=28), "append", "step", 1, 1)
    assert [turn.num_tokens for turn in turns] == [17, 26]


def test_a_mean_number_of_turns_is_kept_in_the_mean():
    lengths = replace(LENGTHS, turns=1.25)
    samples = step_samples(lengths, LIMITS, "append", "step", 40, 5)
    assert len(samples) == pytest.approx(1.25 * 200, rel=0.02)
    assert {sample.turn for sample in samples} == {0, 1}


@pytest.mark.parametrize(
    ("history", "distinct"),
    [
        # of each of 3 tasks the prompt once, of each of its 2 attempts what came after it
        ("append", 3 * (10 + 2 * (3 * 7 + 2 * 2))),
        # what is left of a response stands elsewhere in later prompts, so it is computed again
        ("strip_think", 3 * (10 + 2 * (3 * 7 + 2 * (3 + 2)))),
    ],
)
def test_distinct_tokens_are_counted_once_among_attempts_at_a_task(history, distinct):
    found, _ = iteration(LENGTHS, replace(SHAPE, history=history), FLOPS)
    assert found.distinct_tokens == found.computed_tokens == distinct
    assert found.generated_tokens == 3 * 2 * 3 * 7
    assert found.prompt_tokens == distinct - 3 * 2 * 3 * 7
    assert (found.num_trajectories, found.num_turns, found.num_step_samples) == (6, 18, 18)


def test_rows_of_trajectories_are_fewer_where_nothing_is_stripped():
    found, _ = iteration(LENGTHS, replace(SHAPE, rows="trajectory"), FLOPS)
    assert (found.num_turns, found.num_step_samples) == (18, 6)
    assert found.read_tokens == 6 * (10 + 3 * 7 + 2 * 2)
    found, _ = iteration(LENGTHS, replace(SHAPE, rows="trajectory", history="strip_think"), FLOPS)
    assert found.num_step_samples == 18


def test_padded_rows_cost_the_longest_of_their_micro_batch():
    lengths = replace(LENGTHS, turns=2)
    shape = replace(SHAPE, packing="none", max_tokens=4 * 26, tasks_per_iteration=2)
    found, batches = iteration(lengths, shape, FLOPS)
    # 4 rows of 26 tokens, then 4 of 17, of which one more would be 26 wide
    assert sorted(len(batch) for batch in batches) == [4, 4]
    assert found.computed_tokens == 4 * 26 + 4 * 17
    assert found.flops == FLOPS(4 * 26 + 4 * 17, 4 * (pairs_of(26) + pairs_of(17)), 8 * 7)


def test_ranks_wait_for_the_one_that_computes_most():
    one = iteration(LENGTHS, replace(SHAPE, tasks_per_iteration=3), FLOPS)[0]
    two = iteration(LENGTHS, replace(SHAPE, tasks_per_iteration=3, num_shares=2), FLOPS)[0]
    assert one.flops / 2 < two.flops < one.flops
    assert one.micro_batches == two.micro_batches == 1


def test_more_groups_than_are_made_repeat_those():
    few, many = (iteration(LENGTHS, replace(SHAPE, tasks_per_iteration=n), FLOPS)[0] for n in (24, 96))
    assert many.generated_tokens == 4 * few.generated_tokens
    assert many.flops == pytest.approx(4 * few.flops)


def test_mini_batches_and_passes_are_optimizer_steps():
    found, _ = iteration(LENGTHS, replace(SHAPE, tasks_per_iteration=6, mini_batches=3, passes=2), FLOPS)
    assert found.num_steps == 6
    assert found.generated_tokens == 6 * 2 * 3 * 7


@pytest.mark.parametrize("history", ["append", "strip_think"])
def test_in_the_worst_case_the_last_turn_fills_the_context(history):
    worst = worst_lengths(LIMITS, history, 0.5)
    assert (worst.prompt, worst.response, worst.turns) == (11, 9, 3)
    turns = step_samples(worst, LIMITS, history, "step", 1, 1)
    assert len(turns) == 3
    # what is left over goes in equal parts to two observations
    assert turns[-1].num_tokens in (59, 60)


def test_the_fullest_micro_batch_has_all_the_tokens_that_a_micro_batch_may_have():
    shape = replace(SHAPE, max_tokens=100)
    samples = fullest(iteration(LENGTHS, shape, FLOPS)[1], shape, 1000)
    assert len(collate(samples, [1.0] * len(samples)).tree.token_ids) == 100
    # a sample that is longer runs all the same
    small = replace(SHAPE, max_tokens=20)
    samples = fullest(iteration(LENGTHS, small, FLOPS)[1], small, 1000)
    assert len(collate(samples, [1.0] * len(samples)).tree.token_ids) == 35
    # and a mini-batch that has fewer tokens cannot fill one
    found, batches = iteration(LENGTHS, SHAPE, FLOPS)
    samples = fullest(batches, SHAPE, found.tokens_of_step)
    assert len(collate(samples, [1.0] * len(samples)).tree.token_ids) == found.tokens_of_step == 3 * 60
