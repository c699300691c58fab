"""What the module learns from a mini-batch, against autograd on one sample at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_stepwise.algo import DualClip
from lit_stepwise.algo.packing import collate
from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import PolicyLoss
from lit_stepwise.training import StepwiseModule
from lit_stepwise.types import LossOutput, MiniBatch, StepSample

LOSS = DualClip(low=0.1, high=0.3, dual=2.0)


@pytest.fixture
def module(tiny_model: Path) -> StepwiseModule:
    module = StepwiseModule(str(tiny_model), loss=LOSS, max_tokens_per_micro_batch=40)
    module.configure_model()
    return module


def samples() -> list[StepSample]:
    """Of different lengths and temperatures, some far off-policy so that every branch clips."""
    draw = torch.Generator().manual_seed(4)
    made = []
    for i, (prompt, response) in enumerate([(3, 2), (9, 5), (4, 7), (1, 1), (12, 3), (6, 4)]):
        ids = torch.randint(0, 250, (prompt + response,), generator=draw).tolist()
        logprobs = (torch.randn(response, generator=draw) * 2 - 6).tolist()
        made.append(
            StepSample(
                prompt_ids=ids[:prompt],
                response_ids=ids[prompt:],
                response_mask=[True] * response,
                rollout_logprobs=logprobs,
                advantages=[(-1) ** i * (1 + i / 4)] * response,
                reward=0.0,
                group=i,
                sample=0,
                turn=0,
                policy_version=0,
                temperature=0.5 + i / 4,
            )
        )
    return made


def reference_gradients(module: StepwiseModule, rows: list[StepSample]) -> list[torch.Tensor]:
    """Each sample alone, its full logits, the formula; the mean is over all response tokens."""
    assert module.policy is not None
    model = module.policy.language_model
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1] / row.temperature
        logprobs = logits.log_softmax(-1)[range(len(row.response_ids)), list(row.response_ids)]
        ratio = (logprobs - torch.tensor(row.rollout_logprobs)).exp()
        advantage = row.advantages[0]
        objective = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.3) * advantage)
        if advantage < 0:
            objective = torch.clamp(objective, min=2.0 * advantage)
        total = total - objective.sum()
    total = total / sum(len(row.response_ids) for row in rows)
    return list(torch.autograd.grad(total, list(model.parameters())))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("budget", [15, 40, 10_000])
def test_the_gradient_is_that_of_one_sample_at_a_time_however_the_batch_is_cut(
    module: StepwiseModule, world_size: int, budget: int
) -> None:
    rows = samples()
    expected = reference_gradients(module, rows)
    module.max_tokens_per_micro_batch = budget
    for rank in range(world_size):
        module._trainer = SimpleNamespace(world_size=world_size, global_rank=rank)  # type: ignore[assignment]
        for micro_batch in module._micro_batches(MiniBatch(rows, 0, 0)):
            # a strategy averages the ranks' gradients; here they add up, so divide
            (module._loss(micro_batch) / world_size).backward()
    got = [parameter.grad for parameter in module.policy.language_model.parameters()]  # type: ignore[union-attr]
    for theirs, ours in zip(expected, got, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-6)


class Recorded(PolicyLoss):
    def __call__(self, logprobs: Any, old_logprobs: Any, advantages: Any, mask: Any, turns: Any) -> LossOutput:
        self.turns = turns
        return LossOutput(-logprobs)


def test_the_loss_is_told_which_row_of_the_micro_batch_a_token_belongs_to(module: StepwiseModule) -> None:
    module._trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    loss = Recorded()
    module.objective = replace(module.objective, loss=loss)
    module._loss(collate(samples()[:3], [1.0] * 3))
    assert loss.turns.tolist() == [0] * 2 + [1] * 5 + [2] * 7
    module._loss(collate([], []))
    assert loss.turns.shape == (0,)


def test_trained_tokens_are_the_response_tokens_and_shared_ones_are_forwarded_once(module: StepwiseModule) -> None:
    rows = samples()
    rows.append(replace(rows[1], response_ids=[*rows[1].response_ids[:2], 251, 252, 253], advantages=[0.5] * 5))
    module._trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    for _ in range(2):  # the second step starts from nothing
        loss = module._loss(collate(rows, [1.0] * 7))
        values = module.update_metrics.result()
        assert values["train/loss"] == pytest.approx(float(loss.detach()))
        assert values["tokens/trained"] == 2 + 5 + 7 + 1 + 3 + 4 + 5
        assert values["tokens/forwarded"] == 5 + 14 + 11 + 2 + 15 + 10 + 3
        assert values["tokens/saved"] == 9 + 2


def test_padding_is_forwarded_too(tiny_model: Path) -> None:
    module = StepwiseModule(str(tiny_model), packing="none")
    module.configure_model()
    module._trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    module._loss(collate(samples(), [1.0] * 6, "none"))
    values = module.update_metrics.result()
    assert values["tokens/forwarded"] == 6 * 15
    assert values["tokens/saved"] == 5 + 14 + 11 + 2 + 15 + 10 - 6 * 15


def test_score_equals_the_full_logits_and_says_how_likely_the_likeliest_token_was(module: StepwiseModule) -> None:
    assert module.policy is not None
    said = [([5, 6], [7, 8]), ([5], [6, 7, 9])]
    for (prompt, response), (got, best) in zip(said, module.score(said), strict=True):
        ids = torch.tensor([[*prompt, *response]])
        logprobs = module.policy.language_model(input_ids=ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(got, logprobs[range(len(response)), response], rtol=0, atol=1e-5)
        torch.testing.assert_close(best, logprobs.max(-1).values, rtol=0, atol=1e-5)
        assert not got.requires_grad


def test_score_is_without_dropout_and_leaves_the_model_as_it_was(module: StepwiseModule) -> None:
    assert module.policy is not None
    dropout = torch.nn.Dropout(0.5)
    module.policy.language_model.model.layers[0].register_forward_hook(lambda layer, given, output: dropout(output))
    module.policy.language_model.model.layers[0].dropout = dropout
    assert module.policy.training
    first, second = (module.score([([5, 6], [7, 8])])[0][0] for _ in range(2))
    assert torch.equal(first, second)
    assert dropout.training


def test_weights_have_the_names_of_hugging_face_and_tied_ones_come_once(module: StepwiseModule) -> None:
    names = [name for name, _ in module.weights()]
    assert names[0] == "model.embed_tokens.weight"
    assert "lm_head.weight" not in names
    assert len(names) == len(set(names))


def test_a_checkpoint_of_another_architecture_is_refused_by_name(module: StepwiseModule) -> None:
    state: dict[str, Any] = module.state_dict()
    module.on_load_checkpoint({"state_dict": state})
    name = "policy.language_model.model.norm.weight"
    with pytest.raises(ConfigError, match=rf"another architecture .* 1 tensors differ, the first {name} .*\(7,\)"):
        module.on_load_checkpoint({"state_dict": {**state, name: torch.zeros(7)}})
