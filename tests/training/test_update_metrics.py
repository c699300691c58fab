"""How far engine and trainer are apart, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lit_stepwise.algo.flops import Flops
from lit_stepwise.algo.packing import collate
from lit_stepwise.training.metrics import UpdateMetrics, gaps_of
from lit_stepwise.training.scoring import as_sample

FLOPS = Flops(per_token=1000.0, per_pair=100.0, per_target=10.0)
LONG, SHORT = (as_sample([5, 6], response, temperature=1.0) for response in ([7, 8], [9]))
BATCH = collate([LONG, SHORT], [1.0, 1.0])
# 5 6 7 8 and 5 6 9: five nodes of which the first sees 1, then 2, 3, 4 and 3; three targets
TREE = 5 * 1000 + 13 * 100 + 3 * 10
APART = 7 * 1000 + (10 + 6) * 100 + 3 * 10


def test_the_gap_of_200_tokens() -> None:
    # 0.01, -0.02, 0.03 ... -2.0 in a mixed order: 99 % of 200 are at 1.98 or below
    differences = [(-1) ** (i + 1) * i / 100 for i in range(1, 201)]
    mixed = torch.tensor([differences[77 * i % 200] for i in range(200)])  # each once, for 77 and 200 share no factor
    values = gaps_of(mixed)
    assert values["logprob_gap"] == pytest.approx(201 / 200, rel=1e-6)
    assert values["logprob_gap_p99"] == pytest.approx(1.98, rel=1e-6)
    assert values["logprob_gap_max"] == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize(("num_tokens", "place"), [(1, 1), (2, 2), (100, 99), (101, 100), (300, 297)])
def test_at_least_99_percent_of_the_tokens_are_at_the_percentile_or_below(num_tokens: int, place: int) -> None:
    values = gaps_of(torch.arange(1.0, num_tokens + 1))
    assert values["logprob_gap_p99"] == place


def test_the_divergence_is_the_mean_of_exp_d_minus_1_minus_d() -> None:
    # the engine drew three tokens; the trainer gives them twice, half of and as much probability as the engine
    differences = torch.tensor([math.log(2), -math.log(2), 0.0])
    expected = ((2 - 1 - math.log(2)) + (0.5 - 1 + math.log(2)) + 0) / 3
    assert gaps_of(differences)["rollout_kl"] == pytest.approx(expected, rel=1e-6)


def test_on_average_over_what_the_engine_draws_the_divergence_is_exact() -> None:
    engine, trainer = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    divergence = sum(p * math.log(p / q) for p, q in zip(engine, trainer, strict=True))
    # each token as often as the engine draws it
    differences = [math.log(trainer[token] / engine[token]) for token in (0, 0, 1, 2)]
    assert gaps_of(torch.tensor(differences))["rollout_kl"] == pytest.approx(divergence, rel=1e-6)


def test_asking_for_the_gap_before_the_step_changes_nothing_that_is_logged() -> None:
    metrics = UpdateMetrics()
    for asked, last in ((False, 3.0), (True, -3.0), (False, 6.0)):
        for loss, differences in ((0.5, [0.25, -0.5]), (0.75, []), (2.0, [last])):
            per_token = {"entropy": torch.tensor([loss, 2.0])}
            metrics.update(torch.tensor(loss), per_token, torch.tensor(differences))
            metrics.count(BATCH, 5, FLOPS)
        gap = (0.25 + 0.5 + abs(last)) / 3
        if asked:
            assert metrics.logprob_gap() == metrics.logprob_gap() == gap
        assert metrics.result() == pytest.approx(
            {
                "train/loss": 3.25,
                "train/entropy": (0.5 + 0.75 + 2.0 + 3 * 2.0) / 6,
                "train/logprob_gap": gap,
                "train/logprob_gap_p99": abs(last),
                "train/logprob_gap_max": abs(last),
                "train/rollout_kl": sum(math.exp(d) - 1 - d for d in (0.25, -0.5, last)) / 3,
                "tokens/trained": 9.0,
                "tokens/forwarded": 15.0,
                "tokens/saved": 6.0,
                "flops/trained": 3 * 3 * TREE,
                "flops/saved": 3 * 3 * (APART - TREE),
            }
        )


def test_a_step_of_a_single_token() -> None:
    metrics = UpdateMetrics()
    metrics.update(torch.zeros(()), {}, torch.tensor([-0.5]))
    assert metrics.logprob_gap() == 0.5


def test_a_step_without_a_token_has_no_gap() -> None:
    metrics = UpdateMetrics()
    metrics.update(torch.zeros(()), {"entropy": torch.zeros(0)}, torch.zeros(0))
    metrics.count(collate([], []), 1, FLOPS)
    assert metrics.logprob_gap() == 0.0
    names = ("tokens/trained", "tokens/forwarded", "tokens/saved", "flops/trained", "flops/saved")
    assert metrics.result() == {"train/loss": 0.0, **dict(zip(names, (0, 1, -1, 3 * 1100, -3 * 1100), strict=True))}


def test_what_padding_costs_is_not_called_saved() -> None:
    metrics = UpdateMetrics()
    metrics.update(torch.zeros(()), {}, torch.zeros(0))
    metrics.count(collate([LONG, SHORT], [1.0, 1.0], "none"), 8, FLOPS)
    values = metrics.result()
    assert values["tokens/forwarded"] == 8
    assert values["tokens/saved"] == -1  # 4 and 3 tokens in rows of 4
    assert values["flops/saved"] == 0
