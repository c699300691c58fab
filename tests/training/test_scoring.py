"""Logprobs that nothing is learnt from: the frozen reference, what it costs to leave it, and the policy's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import Precision

from lit_stepwise.algo import KLPenalty
from lit_stepwise.errors import ConfigError
from lit_stepwise.testing import exact_logprobs, save_tiny_model
from lit_stepwise.training import StepwiseModule
from lit_stepwise.training.scoring import Reference
from lit_stepwise.types import Feedback, StepSample, Turn, VersionSpan

IN_LOSS = KLPenalty(coefficient=0.25, estimator="k2", place="loss")
IN_REWARD = KLPenalty(coefficient=0.25, estimator="k1", place="reward")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return save_tiny_model(tmp_path_factory.mktemp("other"), seed=5)


def module_of(path: Path, **settings: Any) -> StepwiseModule:
    module = StepwiseModule(str(path), max_tokens_per_micro_batch=20, **settings)
    module.configure_model()
    trainer = {"world_size": 1, "global_rank": 0, "num_training_batches": 2, "precision_plugin": Precision()}
    module._trainer = SimpleNamespace(**trainer)  # type: ignore[assignment]
    return module


def turn(prompt_ids: list[int], response_ids: list[int]) -> Turn:
    logprobs = [-1.0 - token / 7 for token in response_ids]
    return Turn(prompt_ids, response_ids, logprobs, [VersionSpan(0, len(response_ids))], "", Feedback(""))


TURNS = [turn([5, 6], [7, 8, 9]), turn([5, 6, 7, 8, 9, 3], [11]), turn([4], [])]


def test_without_a_price_no_second_model_is_loaded(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("a reference was loaded")

    monkeypatch.setattr(Reference, "__init__", refuse)
    module = module_of(tiny_model)
    assert module.reference is None
    assert module.reference_penalties(TURNS, 1.0) is None


@pytest.mark.parametrize("kl", [IN_LOSS, IN_REWARD], ids=["loss", "reward"])
def test_the_reference_is_no_part_of_what_is_trained_saved_synced_or_clipped(tiny_model: Path, kl: KLPenalty) -> None:
    alone, module = module_of(tiny_model), module_of(tiny_model, kl=kl)
    assert module.reference is not None
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in alone.named_parameters()]
    assert module.state_dict().keys() == alone.state_dict().keys()
    assert [name for name, _ in module.weights()] == [name for name, _ in alone.weights()]
    optimizer = module.configure_optimizers()["optimizer"]
    trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
    frozen = list(module.reference.model.parameters())
    assert trained == {id(each) for each in module.policy.parameters()}  # type: ignore[union-attr]
    assert len(frozen) > 10
    assert not any(each.requires_grad for each in frozen)
    module.train()
    assert not module.reference.model.training
    assert not module.reference.model.language_model.training


def test_the_reference_is_the_model_at_its_own_path_or_the_policys(tiny_model: Path, other_model: Path) -> None:
    for settings, same in (({}, True), ({"reference_path": str(other_model)}, False)):
        module = module_of(tiny_model, kl=IN_LOSS, **settings)
        assert module.reference is not None
        assert module.policy is not None
        theirs, ours = (dict(each.named_parameters()) for each in (module.reference.model, module.policy))
        name = "language_model.model.norm.weight" if same else "language_model.model.embed_tokens.weight"
        assert torch.equal(theirs[name], ours[name]) == same
        assert theirs[name].data_ptr() != ours[name].data_ptr()


def test_a_reference_that_is_missing_or_of_another_vocabulary_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.reference_path='.*nowhere' cannot be loaded; the folder does not"):
        module_of(tiny_model, kl=IN_LOSS, reference_path=str(tmp_path / "nowhere"))
    module = module_of(tiny_model)
    assert module.policy is not None
    module.policy.language_model.resize_token_embeddings(300)
    module.policy.language_model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.reference_path=.* knows 300 tokens and the policy 267; give"):
        module_of(tiny_model, kl=IN_LOSS, reference_path=str(tmp_path))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_of_a_turn_is_the_sum_over_its_tokens(tiny_model: Path, other_model: Path, estimator: Any) -> None:
    kl = replace(IN_REWARD, estimator=estimator)
    module = module_of(tiny_model, kl=kl, reference_path=str(other_model))
    penalties = module.reference_penalties(TURNS, temperature=0.7)
    assert penalties is not None
    assert penalties[2] == 0.0
    differences = []
    for each, penalty in zip(TURNS[:2], penalties, strict=False):
        logprobs = exact_logprobs(module.reference.model.language_model, each.prompt_ids, each.response_ids, 0.7)  # type: ignore[union-attr]
        chosen = logprobs.double()[range(len(each.response_ids)), list(each.response_ids)]
        difference = torch.tensor(each.rollout_logprobs, dtype=torch.float64) - chosen
        estimates = {"k1": difference, "k2": difference**2 / 2, "k3": (-difference).exp() - 1 + difference}[estimator]
        assert penalty == pytest.approx(0.25 * float(estimates.sum()), rel=1e-5)
        differences += estimates.tolist()
    logged = []
    for _ in range(2):
        module.update_metrics.update(torch.zeros(()), {}, torch.zeros(0))
        logged.append(module.update_metrics.result())
    assert logged[0]["train/kl"] == pytest.approx(sum(differences) / 4, rel=1e-5)
    assert "train/kl" not in logged[1]  # once per iteration, with its first step


def test_a_price_in_the_loss_takes_nothing_from_the_reward(tiny_model: Path) -> None:
    assert module_of(tiny_model, kl=IN_LOSS).reference_penalties(TURNS, 1.0) is None


def test_without_turns_there_are_no_penalties(tiny_model: Path) -> None:
    assert module_of(tiny_model, kl=IN_REWARD).reference_penalties([], 1.0) == []


def samples() -> list[StepSample]:
    made = []
    for i, mask in enumerate(["101", "0", "1111", ""]):
        size = len(mask)
        ids = [(17 * i + 5 * k) % 250 for k in range(3 + i + size)]
        made.append(
            StepSample(
                prompt_ids=ids[: 3 + i],
                response_ids=ids[3 + i :],
                response_mask=[letter == "1" for letter in mask],
                rollout_logprobs=[-0.5] * size,
                advantages=[1.0] * size,
                reward=0.0,
                group=i,
                sample=0,
                turn=0,
                policy_version=0,
                temperature=0.5 + i / 4,
            )
        )
    return made


def test_old_logprobs_are_those_of_the_sampled_tokens_at_their_temperature(tiny_model: Path) -> None:
    module = module_of(tiny_model, old_logprobs="trainer")
    assert module.policy is not None
    assert module.wants_old_logprobs
    scored = module.with_old_logprobs(samples())
    assert [replace(each, old_logprobs=()) for each in scored] == samples()
    for each in scored:
        if each.response_ids:
            full = exact_logprobs(module.policy.language_model, each.prompt_ids, each.response_ids, each.temperature)
            chosen = full[range(len(each.response_ids)), list(each.response_ids)]
            expected = chosen * torch.tensor(each.response_mask)
            assert each.old_logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    assert [len(each.old_logprobs) for each in scored] == [3, 1, 4, 0]
