"""Trajectories to step samples, and to lines of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lit_stepwise.algo import TurnReturn
from lit_stepwise.rollout.samples import assign_credit, step_samples
from lit_stepwise.types import Feedback, StepSample, StopReason, Trajectory, Turn, VersionSpan


def turn(token: int, reward: float) -> Turn:
    feedback = Feedback(f"saw {token}", {"format": reward / 4, "outcome": reward * 3 / 4})
    return Turn([token, token + 1], [token + 2], [-0.1 * token], [VersionSpan(11, 1)], f"said {token}", feedback)


SOUND = Trajectory("a", 0, 0, [turn(10, 1.0), turn(20, 2.0)], StopReason.DONE, temperature=0.7)
OTHER = Trajectory("a", 0, 1, [turn(30, 0.0)], StopReason.MAX_TURNS, temperature=0.7)
FAILED = Trajectory("a", 0, 2, [turn(40, 100.0)], StopReason.FAILED, failure="disk full")


def test_every_turn_becomes_a_sample_with_its_own_ids_reward_and_advantage() -> None:
    trajectories = [SOUND, FAILED, OTHER]
    samples = step_samples(trajectories, assign_credit(trajectories, TurnReturn(norm_by_std=False)))
    # returns to go (3, 2) and (0): means 1.5 and 1, with the failed trajectory out of the group
    assert [(list(s.prompt_ids), list(s.response_ids), s.reward, list(s.advantages)) for s in samples] == [
        ([10, 11], [12], 1.0, [1.5]),
        ([20, 21], [22], 2.0, [1.0]),
        ([30, 31], [32], 0.0, [-1.5]),
    ]
    assert [s.response_mask for s in samples] == [[True]] * 3
    assert [(s.group, s.sample, s.turn, s.policy_version, s.temperature) for s in samples] == [
        (0, 0, 0, 11, 0.7),
        (0, 0, 1, 11, 0.7),
        (0, 1, 0, 11, 0.7),
    ]


def said(prompt: list[int], response: list[int], reward: float, token_rewards: Sequence[float] = ()) -> Turn:
    logprobs = [-token / 100 for token in response]
    return Turn(
        prompt,
        response,
        logprobs,
        [VersionSpan(7, len(response))],
        "",
        Feedback("", {"r": reward}),
        token_rewards=token_rewards,
    )


CONTINUED = Trajectory(
    "a", 3, 1, [said([1, 2], [3, 4], 0.5), said([1, 2, 3, 4, 5, 6], [7], 0.25), said([1, 2, 3, 4, 5, 6, 7, 8], [9], 2)],
    StopReason.DONE, temperature=0.7,
)  # fmt: skip


def test_all_turns_of_a_trajectory_can_be_one_row_in_which_the_environment_is_not_trained() -> None:
    (row,) = step_samples([CONTINUED], [[1.5, -1.0, 0.125]], rows="trajectory")
    assert (list(row.prompt_ids), row.response_ids) == ([1, 2], [3, 4, 5, 6, 7, 8, 9])
    assert row.response_mask == [True, True, False, False, True, False, True]
    assert row.advantages == [1.5, 1.5, 0.0, 0.0, -1.0, 0.0, 0.125]
    assert row.rollout_logprobs == [-0.03, -0.04, 0.0, 0.0, -0.07, 0.0, -0.09]
    assert (row.reward, row.group, row.sample, row.turn, row.temperature) == (2.75, 3, 1, 0, 0.7)
    assert (row.num_tokens, row.num_response_tokens) == (9, 4)


def test_a_prompt_that_does_not_continue_the_last_begins_a_new_row() -> None:
    stripped = replace(
        CONTINUED, turns=[CONTINUED.turns[0], said([1, 2, 5, 6], [7], 0.25), said([1, 2, 5, 6, 7], [9], 2)]
    )
    rows = step_samples([stripped], [[1.5, -1.0, 0.125]], rows="trajectory")
    assert [(list(row.prompt_ids), list(row.response_ids), row.turn) for row in rows] == [
        ([1, 2], [3, 4], 0),
        ([1, 2, 5, 6], [7, 9], 1),
    ]


def test_both_kinds_of_rows_train_every_sampled_token_once_with_the_same_advantage() -> None:
    def trained(samples: list[StepSample]) -> list[tuple[int, float, float]]:
        return sorted(
            (token, logprob, advantage)
            for row in samples
            for token, mask, logprob, advantage in zip(
                row.response_ids, row.response_mask, row.rollout_logprobs, row.advantages, strict=True
            )
            if mask
        )

    advantages = [[1.5, -1.0, 0.125], [0.5, 0.75]]
    alone = step_samples([CONTINUED, SOUND], advantages)
    joined = step_samples([CONTINUED, SOUND], advantages, rows="trajectory")
    assert trained(alone) == trained(joined)
    assert (len(alone), len(joined)) == (5, 3)


def test_token_rewards_are_added_to_the_advantages_of_their_own_tokens() -> None:
    turns = [said([1, 2], [3, 4], 0.5, [0.0, -0.25]), said([1, 2, 3, 4, 5], [6], 1.0)]
    (row,) = step_samples([Trajectory("a", 0, 0, turns, StopReason.DONE)], [[1.5, 2.0]], rows="trajectory")
    assert row.advantages == [1.5, 1.25, 0.0, 2.0]
    assert row.reward == 1.5


def test_a_failed_trajectory_gets_no_credit_and_changes_nobody_elses() -> None:
    advantage = TurnReturn(norm_by_std=False)
    assert assign_credit([SOUND, FAILED, OTHER], advantage) == [[1.5, 1.0], [0.0], [-1.5]]
