"""The policy objectives, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lit_stepwise.algo import DualClip
from lit_stepwise.errors import ConfigError

LOSS = DualClip(low=0.2, high=0.28, dual=3.0)  # all different, so that no two can be mixed up unseen


def loss_of(ratio: float, advantage: float, loss: DualClip = LOSS) -> float:
    output = loss(
        torch.tensor([math.log(ratio) - 0.7]), torch.tensor([-0.7]), torch.tensor([advantage]), torch.tensor([True])
    )
    return float(output.losses)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.1, 2.0, -2.2),  # inside the trust region: -r A
        (2.0, 2.0, -2.56),  # clipped at 1 + high
        (0.5, 2.0, -1.0),  # a good action that became rare is pushed all the way: -r A
        (0.9, -1.5, 1.35),  # inside
        (0.5, -1.5, 1.2),  # clipped at 1 - low
        (2.0, -1.5, 3.0),  # a bad action that became likely: -r A
        (9.0, -1.5, 4.5),  # the floor: dual |A|
        (9.0, 0.0, 0.0),
    ],
)
def test_dual_clip_matches_the_formula_worked_by_hand(ratio: float, advantage: float, expected: float) -> None:
    assert loss_of(ratio, advantage) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [(1.1, 2.0, -2.2), (2.0, 2.0, 0.0), (0.5, -1.5, 0.0), (2.0, -1.5, 3.0), (9.0, -1.5, 0.0)],
)
def test_clipped_tokens_have_no_gradient_and_others_have_r_times_a(
    ratio: float, advantage: float, gradient: float
) -> None:
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    LOSS(logprobs, torch.zeros(1), torch.tensor([advantage]), torch.tensor([True])).losses.sum().backward()
    assert logprobs.grad is not None
    assert float(logprobs.grad) == pytest.approx(gradient, abs=1e-5)


def test_each_branch_is_marked_where_it_holds_and_nowhere_else() -> None:
    ratios = torch.tensor([1.5, 0.5, 5.0, 1.5, 0.5, 5.0, 5.0])
    advantages = torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0, 1.0, -1.0])
    mask = torch.tensor([True] * 6 + [False])
    output = LOSS(ratios.log(), torch.zeros(7), advantages, mask)
    assert {name: values.int().tolist() for name, values in output.fractions.items()} == {
        "clip_high": [1, 0, 0, 0, 0, 1, 0],
        "clip_low": [0, 1, 0, 0, 0, 0, 0],
        "dual_clip": [0, 0, 1, 0, 0, 0, 0],
    }
    assert output.losses[6] == 0


def test_a_ratio_beyond_float32_gives_a_finite_loss_and_gradient() -> None:
    logprobs = torch.tensor([0.0, 0.0], requires_grad=True)
    losses = LOSS(
        logprobs, torch.tensor([-200.0, -200.0]), torch.tensor([1.0, -1.0]), torch.tensor([True, True])
    ).losses
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([-1.28, 3.0])
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"low": 1.0}, "loss.low=1.0"), ({"high": -0.1}, "loss.high=-0.1"), ({"dual": 1.28}, "loss.dual=1.28")],
)
def test_settings_that_cannot_work_are_refused_by_name(fields: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        DualClip(**fields)
