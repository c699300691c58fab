"""Step samples in a tree, against one sample at a time: the same log-probabilities and the same gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins import Precision
from torch.distributed.fsdp import fully_shard

from lit_stepwise.algo import DualClip
from lit_stepwise.algo.packing import Packing
from lit_stepwise.training import StepwiseModule
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.types import MiniBatch, StepSample

VOCABULARY = 50
LOSS = DualClip(low=0.1, high=0.3, dual=2.0)


@dataclass(frozen=True)
class Conversations:
    """What is played: groups of attempts at one task each, with so many turns each."""

    turns: tuple[tuple[int, ...], ...]
    template: Literal["append", "strip"] = "append"
    seed: int = 0

    def samples(self) -> list[StepSample]:
        """With a template that strips, of the thoughts in a response only the last two tokens stay in later prompts."""
        draw = random.Random(self.seed)
        tokens = lambda size: [draw.randrange(VOCABULARY) for _ in range(size)]  # noqa: E731
        system, made = tokens(3), []
        for group, attempts in enumerate(self.turns):
            task = tokens(draw.randint(2, 7))
            for attempt, num_turns in enumerate(attempts):
                prompt = [*system, *task]
                for turn in range(num_turns):
                    response = tokens(draw.randint(1, 6))
                    made.append(step_sample(draw, prompt, response, group, attempt, turn))
                    stays = response if self.template == "append" else response[-2:]
                    prompt = [*prompt, *stays, *tokens(draw.randint(1, 4))]
        return made


def step_sample(
    draw: random.Random, prompt: list[int], response: list[int], group: int, attempt: int, turn: int
) -> StepSample:
    return StepSample(
        prompt_ids=prompt,
        response_ids=response,
        response_mask=[i % 4 != 3 for i in range(len(response))],  # a standard row has tokens that nobody sampled
        rollout_logprobs=[draw.gauss(-4, 1) for _ in response],
        advantages=[draw.gauss(0, 1) for _ in response],
        reward=0.0,
        group=group,
        sample=attempt,
        turn=turn,
        policy_version=0,
        temperature=0.75,
    )


PLAYED = {
    "ragged, appended": Conversations(((3, 1, 2), (2, 4), (1,)), "append"),
    "ragged, stripped": Conversations(((3, 1, 2), (2, 4), (1,)), "strip", seed=1),
    "single turns": Conversations(((1, 1, 1, 1), (1, 1)), seed=2),
    "one sample": Conversations(((1,),), seed=3),
}


def language_model(kind: Literal["qwen3", "qwen2"]) -> Any:
    """In float64 throughout: the norms of transformers compute in float32, whatever they are given."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(7)
    model: Any = (
        Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8, tie_word_embeddings=True))
        if kind == "qwen3"
        else Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=False))
    )
    for module in list(model.modules()):
        for name, child in module.named_children():
            if "RMSNorm" in type(child).__name__:
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double().train()


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def module_of(policy: PolicyModel, world_size: int = 1, rank: int = 0, **settings: Any) -> StepwiseModule:
    module = StepwiseModule("unused", loss=LOSS, packing=policy.packing, **settings)
    module.policy = policy
    trainer = {"world_size": world_size, "global_rank": rank, "num_training_batches": 1}
    module._trainer = SimpleNamespace(**trainer, precision_plugin=Precision())  # type: ignore[assignment]
    return module


def one_at_a_time(model: Any, samples: list[StepSample]) -> tuple[list[list[float]], list[torch.Tensor]]:
    """Each sample alone, with all its logits; the mean of the loss is over all sampled tokens."""
    every, total = [], torch.zeros(())
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        logits = model(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1] / sample.temperature
        logprobs = logits.log_softmax(-1)[range(len(sample.response_ids)), list(sample.response_ids)]
        ratio = (logprobs - torch.tensor(sample.rollout_logprobs)).exp()
        advantages = torch.tensor(sample.advantages)
        objective = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.3) * advantages)
        objective = torch.where(advantages < 0, torch.maximum(objective, 2.0 * advantages), objective)
        mask = torch.tensor(sample.response_mask)
        total = total - objective[mask].sum()
        every.append(logprobs.where(mask, 0.0).tolist())
    total = total / sum(sum(sample.response_mask) for sample in samples)
    return every, list(torch.autograd.grad(total, list(model.parameters())))


def trained(module: StepwiseModule, samples: list[StepSample]) -> list[torch.Tensor]:
    """This rank's gradients of an update."""
    assert module.policy is not None
    for micro_batch in module._micro_batches(MiniBatch(samples, 0, 0)):
        module._loss(micro_batch).backward()
    return [parameter.grad for parameter in module.policy.parameters()]  # type: ignore[misc]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 1e-10) -> bool:
    """Relative to the length of the whole gradient of each parameter."""
    assert len(ours) == len(theirs) > 10
    pairs = zip(ours, theirs, strict=True)
    return all(float((our - their).norm()) <= tolerance * max(1e-3, float(their.norm())) for our, their in pairs)


@pytest.mark.parametrize("packing", ["tree", "trajectory", "none"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
@pytest.mark.parametrize("played", PLAYED.values(), ids=PLAYED)
def test_logprobs_and_gradients_are_those_of_one_sample_at_a_time(
    played: Conversations, kind: Literal["qwen3", "qwen2"], packing: Packing
) -> None:
    samples = played.samples()
    samples = [*samples, replace(samples[0], sample=9, advantages=[-0.5 * x for x in samples[0].advantages])]  # again
    expected_logprobs, expected = one_at_a_time(language_model(kind), samples)
    for max_tokens in (10_000, 18, 1):  # a tree that is whole, one that is cut, and every sample alone
        module = module_of(PolicyModel(language_model(kind), 5, packing), max_tokens_per_micro_batch=max_tokens)
        found = [list(each.old_logprobs) for each in module.with_old_logprobs(samples)]
        for ours, theirs in zip(found, expected_logprobs, strict=True):
            assert ours == pytest.approx(theirs, rel=0, abs=1e-12)
        assert same(trained(module, samples), expected)


def test_gradient_checkpointing_changes_nothing() -> None:
    samples = PLAYED["ragged, stripped"].samples()
    _, expected = one_at_a_time(language_model("qwen3"), samples)
    model = language_model("qwen3")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: recomputed.append(1))
    module = module_of(PolicyModel(model), max_tokens_per_micro_batch=30)
    assert same(trained(module, samples), expected)
    num_micro_batches = len(module.plan(samples)[0])
    assert len(recomputed) == 2 * num_micro_batches > 2


@settings(deadline=None, max_examples=25)
@given(
    turns=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(tuple),
    template=st.sampled_from(["append", "strip"]),
    seed=st.integers(0, 1000),
    max_tokens=st.integers(1, 120),
    packing=st.sampled_from(["tree", "trajectory"]),
)
def test_whatever_is_played_and_however_it_is_cut(
    turns: tuple[tuple[int, ...], ...], template: Any, seed: int, max_tokens: int, packing: Packing
) -> None:
    samples = Conversations(turns, template, seed).samples()
    expected_logprobs, expected = one_at_a_time(language_model("qwen3"), samples)
    module = module_of(PolicyModel(language_model("qwen3"), 7, packing), max_tokens_per_micro_batch=max_tokens)
    found = [x for each in module.with_old_logprobs(samples) for x in each.old_logprobs]
    assert found == pytest.approx([x for row in expected_logprobs for x in row], rel=0, abs=1e-12)
    assert same(trained(module, samples), expected)


def shard(rank: int, folder: str) -> None:
    """What each of two processes does with its share of the micro-batches."""
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", world_size=2, rank=rank)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for name, played in PLAYED.items():
        samples = played.samples()
        model = language_model("qwen3")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = PolicyModel(model, chunk_tokens=5)
        for layer in policy.language_model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(policy, mesh=mesh)
        module = module_of(policy, world_size=2, rank=rank, max_tokens_per_micro_batch=20)
        logprobs = [list(each.old_logprobs) for each in module.with_old_logprobs(samples)]
        gradients = [each.full_tensor() for each in trained(module, samples)]  # type: ignore[attr-defined]
        torch.save({"logprobs": logprobs, "gradients": gradients}, f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_that_shard_the_model_are_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(shard, (str(tmp_path),), nprocs=2)
    for name, played in PLAYED.items():
        expected_logprobs, expected = one_at_a_time(language_model("qwen3"), played.samples())
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            for ours, theirs in zip(found["logprobs"], expected_logprobs, strict=True):
                assert ours == pytest.approx(theirs, rel=0, abs=1e-12)
            assert same(found["gradients"], expected)
