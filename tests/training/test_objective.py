"""The gradient of a mini-batch, against one row and one token at a time in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lit_stepwise.algo import GSPO, DualClip, KLPenalty, RolloutCorrection
from lit_stepwise.algo.reductions import Reduction
from lit_stepwise.errors import ConfigError
from lit_stepwise.training import StepwiseModule
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.training.scoring import Reference
from lit_stepwise.types import MiniBatch, StepSample

VOCABULARY = 23
BUDGET = 7
"""Tokens of a turn, for the reduction ``constant``."""


@pytest.fixture
def exact() -> Iterator[None]:
    """Numbers without a type of their own are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def language_model(seed: int) -> Any:
    """A GPT-2, none of whose layers falls back to float32 as those of a Qwen3 do."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=12, n_layer=2, n_head=2, initializer_range=0.4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def module_with(num_steps: int = 2, **settings: Any) -> StepwiseModule:
    """A module whose iterations have so many optimizer steps."""
    settings = {"loss": DualClip(low=0.1, high=0.3, dual=1.7), "max_response_tokens": BUDGET, **settings}
    module = StepwiseModule("unused", **settings)
    module.policy = PolicyModel(language_model(1).to(torch.get_default_dtype()), chunk_tokens=5)
    if module.objective.kl.needs_reference:
        module.reference = Reference(PolicyModel(language_model(2).to(torch.get_default_dtype()), chunk_tokens=4))
    module._trainer = SimpleNamespace(world_size=1, global_rank=0, num_training_batches=num_steps)  # type: ignore[assignment]
    return module


def parameters(module: StepwiseModule) -> list[Tensor]:
    assert module.policy is not None
    return list(module.policy.parameters())


def gradient_of(module: StepwiseModule, rows: list[StepSample]) -> list[Tensor]:
    """What an optimizer step would find."""
    module.zero_grad()
    for micro_batch in module._micro_batches(MiniBatch(rows, 0, 0)):
        module._loss(micro_batch).backward()
    return [each.grad.clone() for each in parameters(module) if each.grad is not None]


def row(draw: random.Random, group: int, sample: int, turn: int, shape: tuple[int, str]) -> StepSample:
    """A prompt of so many tokens, and a response with a letter per token: ``s`` sampled, ``o`` observed."""
    num_prompt, letters = shape
    size = len(letters)
    rollout = [draw.uniform(-4, -1) for _ in range(size)]
    return StepSample(
        prompt_ids=[draw.randrange(VOCABULARY) for _ in range(num_prompt)],
        response_ids=[draw.randrange(VOCABULARY) for _ in range(size)],
        response_mask=[letter == "s" for letter in letters],
        rollout_logprobs=rollout,
        advantages=[draw.uniform(-2, 2) for _ in range(size)],
        reward=0.0,
        group=group,
        sample=sample,
        turn=turn,
        policy_version=0,
        temperature=0.75 + group / 8,
        old_logprobs=[value + draw.uniform(-0.6, 0.6) for value in rollout],
    )


def rows() -> list[StepSample]:
    """Two tasks; one attempt of two turns, one of one, one of three in a single row, one with nothing sampled."""
    draw = random.Random(5)
    return [
        row(draw, 3, 0, 0, (4, "sss")),
        row(draw, 8, 0, 0, (2, "ssoossssos")),
        row(draw, 3, 0, 1, (9, "sssss")),
        row(draw, 3, 1, 0, (4, "s")),
        row(draw, 8, 1, 0, (1, "oo")),
        row(draw, 8, 2, 0, (6, "ssss")),
    ]


def token_loss(module: StepwiseModule, sample: StepSample, position: int, logits: Tensor, ref: Tensor) -> Tensor:
    """The formulas of one token; ``logits`` and ``ref`` [V] stand before it."""
    settings = module.objective
    token, advantage = sample.response_ids[position], sample.advantages[position]
    logprobs = (logits / sample.temperature).log_softmax(-1)
    difference = logprobs[token] - (ref / sample.temperature).log_softmax(-1)[token]
    ratio = (logprobs[token] - sample.old_logprobs[position]).exp()
    objective = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.3) * advantage)
    if advantage < 0:
        objective = objective.clamp(min=1.7 * advantage)
    gaps = [
        math.exp(old - rollout)
        for old, rollout, sampled in zip(
            sample.old_logprobs, sample.rollout_logprobs, sample.response_mask, strict=True
        )
        if sampled
    ]
    low, high = settings.correction.outlier_band or (0.0, math.inf)
    if not low <= min(gaps) <= max(gaps) <= high:
        return logits.sum() * 0
    loss = -objective
    if settings.correction.token_cap is not None:
        gap = math.exp(sample.old_logprobs[position] - sample.rollout_logprobs[position])
        loss = min(gap, settings.correction.token_cap) * loss
    estimate = {"k2": difference**2 / 2, "k3": (-difference).exp() - 1 + difference}[settings.kl.estimator]
    entropy = -(logprobs.exp() * logprobs).sum()
    return loss + settings.kl.coefficient * estimate - settings.entropy_bonus * entropy


def naive_gradient(module: StepwiseModule, samples: list[StepSample]) -> list[Tensor]:
    """Row by row, token by token, mean by mean."""
    assert module.policy is not None
    reference = module.reference.model if module.reference else module.policy
    losses: dict[tuple[int, int, int], list[Tensor]] = {}  # by task, attempt and row
    for index, sample in enumerate(samples):
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        logits = module.policy.language_model(input_ids=ids).logits[0]
        ref = reference.language_model(input_ids=ids).logits[0].detach()
        for position, sampled in enumerate(sample.response_mask):
            if sampled:
                before = len(sample.prompt_ids) + position - 1
                losses.setdefault((sample.group, sample.sample, index), []).append(
                    token_loss(module, sample, position, logits[before], ref[before])
                )
    if module.reduction == "constant":
        num_attempts = len({(sample.group, sample.sample) for sample in samples})
        total = torch.stack([each for row in losses.values() for each in row]).sum() / (num_attempts * BUDGET)
    else:
        depth = {"token": 0, "prompt": 1, "trajectory": 2, "step": 3}[module.reduction]
        units: dict[tuple[int, ...], list[Tensor]] = {}
        for place, values in losses.items():
            units.setdefault(place[:depth], []).extend(values)
        total = torch.stack([torch.stack(values).mean() for values in units.values()]).mean()
    return list(torch.autograd.grad(total, parameters(module)))


def own_logprobs(module: StepwiseModule, sample: StepSample) -> list[float]:
    """[R] The policy's, of the response tokens."""
    assert module.policy is not None
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
    logprobs = (module.policy.language_model(input_ids=ids).logits[0] / sample.temperature).log_softmax(-1)
    found: list[float] = logprobs[
        range(len(sample.prompt_ids) - 1, sample.num_tokens - 1), sample.response_ids
    ].tolist()
    return found


def check_equal(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """The tolerance is relative to the largest number, or to 1."""
    largest = max(float(each.abs().max()) for each in expected)
    assert largest > 0.01
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(largest, 1.0))


ALL = {
    "kl": KLPenalty(coefficient=0.3, estimator="k3"),
    "entropy_bonus": 0.2,
    "old_logprobs": "trainer",
    "correction": RolloutCorrection(token_cap=1.25, outlier_band=(0.72, 1.59)),
}
EXTRAS: dict[str, dict[str, Any]] = {
    "the loss alone": {},
    "a KL penalty k2": {"kl": KLPenalty(coefficient=0.3, estimator="k2")},
    "a KL penalty k3": {"kl": ALL["kl"]},
    "an entropy bonus": {"entropy_bonus": 0.2},
    "capped weights": {"old_logprobs": "trainer", "correction": RolloutCorrection(token_cap=1.25)},
    "masked rows": {"old_logprobs": "trainer", "correction": RolloutCorrection(outlier_band=(0.72, 1.59))},
    "all of it": ALL,
}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_the_gradient_is_that_of_the_formulas_with(extra: dict[str, Any]) -> None:
    module = module_with(reduction="trajectory", **extra)
    check_equal(gradient_of(module, rows()), naive_gradient(module, rows()), 1e-12)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("reduction", get_args(Reduction))
def test_the_gradient_is_the_mean_over(reduction: Reduction) -> None:
    module = module_with(reduction=reduction, **ALL)
    check_equal(gradient_of(module, rows()), naive_gradient(module, rows()), 1e-12)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("reduction", get_args(Reduction))
@pytest.mark.parametrize("loss", [DualClip(low=0.1, high=0.3, dual=1.7), GSPO(turn_low=0.1, turn_high=0.3)])
def test_cutting_and_shuffling_a_mini_batch_changes_nothing(reduction: Reduction, loss: Any) -> None:
    whole = gradient_of(module_with(reduction=reduction, **ALL, loss=loss, max_tokens_per_micro_batch=999), rows())
    for budget, num_parts in ((999, 1), (42, 2), (14, 4)):
        module = module_with(reduction=reduction, **ALL, loss=loss, max_tokens_per_micro_batch=budget)
        shuffled = random.Random(budget).sample(rows(), len(rows()))
        assert len(module._plan(shuffled)) == num_parts
        check_equal(gradient_of(module, shuffled), whole, 1e-12)


def test_in_float32_cutting_and_shuffling_stays_within_its_precision() -> None:
    whole = gradient_of(module_with(reduction="step", **ALL, max_tokens_per_micro_batch=999), rows())
    for budget in (42, 14):
        module = module_with(reduction="step", **ALL, max_tokens_per_micro_batch=budget)
        check_equal(gradient_of(module, random.Random(budget).sample(rows(), 6)), whole, 1e-6)


def turns_of(whole: StepSample) -> list[StepSample]:
    """The turns of a row in rows of their own, each with all that came before it as its prompt."""
    ids, mask = [*whole.prompt_ids, *whole.response_ids], list(whole.response_mask)
    edges = [i for i in range(len(mask) + 1) if i in (0, len(mask)) or mask[i] != mask[i - 1]]
    made = []
    for start, end in pairwise(edges):
        if mask[start]:
            cut = {
                name: getattr(whole, name)[start:end]
                for name in ("response_ids", "response_mask", "rollout_logprobs", "advantages", "old_logprobs")
            }
            made.append(replace(whole, prompt_ids=ids[: len(whole.prompt_ids) + start], turn=len(made), **cut))
    return made


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("reduction", ["token", "trajectory", "prompt", "constant"])
def test_a_trajectory_in_one_row_has_the_gradient_of_its_turns_in_rows_of_their_own(reduction: Reduction) -> None:
    # without the mask over a whole row, which does not say the same of a turn
    settings = {**ALL, "correction": RolloutCorrection(token_cap=1.25)}
    module = module_with(reduction=reduction, **settings)
    joined = [each for each in rows() if any(each.response_mask)]
    single = [turn for each in joined for turn in turns_of(each)]
    assert len(single) == len(joined) + 2
    check_equal(gradient_of(module, joined), gradient_of(module, single), 1e-12)


@pytest.mark.usefixtures("exact")
def test_in_an_iteration_of_one_step_the_old_logprobs_are_those_of_the_step() -> None:
    module = module_with(num_steps=1, **{**ALL, "correction": RolloutCorrection(token_cap=1.25)})
    samples = [replace(each, old_logprobs=own_logprobs(module, each)) for each in rows()]
    check_equal(gradient_of(module, rows()), naive_gradient(module, samples), 1e-12)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("value", [-math.inf, math.nan])
@pytest.mark.parametrize("name", ["rollout_logprobs", "old_logprobs"])
def test_a_token_without_a_finite_logprob_adds_nothing_and_is_counted(name: str, value: float) -> None:
    module = module_with(**{**ALL, "correction": RolloutCorrection(token_cap=1.25)})
    samples = rows()
    broken = replace(samples[0], **{name: [getattr(samples[0], name)[0], value, getattr(samples[0], name)[2]]})
    got = gradient_of(module, [broken, *samples[1:]])
    values = module.update_metrics.result()
    assert values["train/non_finite_fraction"] == pytest.approx(1 / 20)
    assert all(math.isfinite(each) for each in values.values())
    # the same token, not sampled: but then one fewer is counted
    without = replace(samples[0], response_mask=[True, False, True])
    expected = [each * 19 / 20 for each in gradient_of(module, [without, *samples[1:]])]
    check_equal(got, expected, 1e-12)


@pytest.mark.usefixtures("exact")
def test_what_is_logged_is_the_loss_and_means_over_sampled_tokens() -> None:
    module = module_with(reduction="step", **ALL)
    gradient_of(module, rows())
    values = module.update_metrics.result()
    gaps = [
        abs(old - rollout)
        for each in rows()
        for old, rollout, sampled in zip(each.old_logprobs, each.rollout_logprobs, each.response_mask, strict=True)
        if sampled
    ]
    assert values["train/old_logprob_gap"] == pytest.approx(sum(gaps) / 20, rel=1e-5)
    differences = [
        own_logprobs(module, each)[position] - each.rollout_logprobs[position]
        for each in rows()
        for position, sampled in enumerate(each.response_mask)
        if sampled
    ]
    assert values["train/logprob_gap"] == pytest.approx(sum(map(abs, differences)) / 20, rel=1e-5)
    assert values["train/rollout_kl"] == pytest.approx(sum(math.exp(d) - 1 - d for d in differences) / 20, rel=1e-5)
    assert values["tokens/trained"] == 20
    assert values["train/outlier_mask_fraction"] == pytest.approx((5 + 4) / 20)
    fractions = {name for name in values if name.endswith("_fraction")}
    assert fractions == {
        f"train/{name}_fraction"
        for name in ("clip_high", "clip_low", "dual_clip", "non_finite", "token_cap", "outlier_mask")
    }
    assert {"train/kl", "train/entropy", "train/logprob_gap"} < values.keys()
    total = sum(float(module._loss(each).detach()) for each in module._micro_batches(MiniBatch(rows(), 0, 0)))
    assert values["train/loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kl", [KLPenalty(), KLPenalty(coefficient=0.5, estimator="k1", place="reward")])
def test_an_update_asks_neither_reference_nor_trainer_for_logprobs_it_does_not_need(kl: KLPenalty) -> None:
    module = module_with(kl=kl)
    gradient_of(module, rows())
    assert not {"train/kl", "train/old_logprob_gap"} & module.update_metrics.result().keys()


NONE, CAPPED, BAND = RolloutCorrection(), RolloutCorrection(token_cap=2.0), RolloutCorrection(outlier_band=(0.5, 2.0))


@pytest.mark.parametrize(
    ("old_logprobs", "correction", "on_policy", "running_ahead"),
    [
        (None, None, ("rollout", NONE), ("trainer", CAPPED)),
        (None, BAND, ("trainer", BAND), ("trainer", BAND)),
        (None, NONE, ("rollout", NONE), ("trainer", NONE)),
        ("trainer", None, ("trainer", NONE), ("trainer", CAPPED)),
        ("trainer", BAND, ("trainer", BAND), ("trainer", BAND)),
        ("rollout", None, ("rollout", NONE), ("rollout", NONE)),
    ],
)
def test_what_is_left_open_is_chosen_by_how_play_runs(
    old_logprobs: Any, correction: Any, on_policy: Any, running_ahead: Any
) -> None:
    module = StepwiseModule("unused", old_logprobs=old_logprobs, correction=correction)
    for staleness, expected in ((0, on_policy), (1, running_ahead), (3, running_ahead)):
        module.staleness = staleness
        module.setup("fit")
        assert (module.objective.old_logprobs, module.objective.correction) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_bonus": -0.5}, r"model\.entropy_bonus=-0\.5 is not 0 or more; use"),
        ({"entropy_bonus": math.inf}, r"model\.entropy_bonus=inf is not 0 or more; use"),
        ({"old_logprobs": "engine"}, r"model\.old_logprobs='engine' is unknown; use 'rollout' or 'trainer'"),
        (
            {"old_logprobs": "rollout", "correction": RolloutCorrection(sequence_cap=3.0)},
            r"sequence_cap=3\.0.*use model\.old_logprobs='trainer'",
        ),
        ({"reduction": "mean"}, r"model\.reduction='mean' is unknown; use one of token, step, trajectory"),
        ({"max_response_tokens": 0}, r"model\.max_response_tokens=0; use 1 or more"),
        ({"reference_path": "base"}, r"model\.reference_path='base' has no effect while model\.kl\.coefficient is 0"),
    ],
)
def test_settings_that_can_never_work_are_refused_with_a_way_out(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepwiseModule("unused", **settings)
