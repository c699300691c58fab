"""After every update the engine samples the policy that is trained, to the last bits of its precision."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lit_stepwise.engines.vllm import VLLMEngine
from lit_stepwise.engines.vllm_adapters import adapter_settings
from lit_stepwise.errors import ConfigError, EngineError
from lit_stepwise.testing import exact_logprobs, save_tiny_model
from lit_stepwise.types import Adapter, Completion, Request, Sampling, VersionSpan

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
PROMPTS = [[11, 12, 13], [40] * 35, [7, 99, 7, 99, 3]]
RANK, ALPHA = 5, 13
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def save_tiny_qwen2(folder: Path, tie_word_embeddings: bool) -> Path:
    wanted = json.loads((save_tiny_model(folder, tie_word_embeddings=tie_word_embeddings) / "config.json").read_text())
    for name in ("model_type", "architectures", "head_dim"):
        del wanted[name]
    wanted |= {"num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 32, the smallest for vLLM on a CPU
    with torch.random.fork_rng():
        torch.manual_seed(4)
        Qwen2ForCausalLM(Qwen2Config(**wanted)).save_pretrained(folder)
    return folder


def play(engine: VLLMEngine) -> list[Completion]:
    engine.begin_phase(5)
    for i, prompt in enumerate(PROMPTS):
        engine.submit(Request(str(i), prompt, 8, Sampling(), 0))
    done: list[Completion] = []
    while engine.num_pending:
        done += engine.step()
    engine.end_phase()
    return sorted(done, key=lambda each: each.request_id)


def largest_gap(model: Any, done: list[Completion]) -> float:
    gaps = []
    for prompt, each in zip(PROMPTS, done, strict=True):
        expected = exact_logprobs(model, prompt, each.response_ids)
        taken = expected.gather(1, torch.tensor(each.response_ids)[:, None])[:, 0]
        gaps.append((taken - torch.tensor(each.logprobs)).abs().max())
    return float(max(gaps))


def update(model: Any, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("save", [save_tiny_model, save_tiny_qwen2], ids=["qwen3", "qwen2"])
def test_after_each_of_twenty_updates_the_engine_samples_the_policy(save: Any, tied: bool, tmp_path: Path) -> None:
    folder = save(tmp_path, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings == tied
    generator = torch.Generator().manual_seed(1)
    engine = VLLMEngine(kv_cache_memory_mb=16)
    engine.start(str(folder), 64)
    for version in range(20):
        update(model, generator)
        engine.load_weights(model.named_parameters(), version)
        done = play(engine)
        assert largest_gap(model, done) < 1e-4
        assert {each.versions[0].policy_version for each in done} == {version}
    update(model, generator)
    assert largest_gap(model, done) > 0.1  # an update that was missed would be seen
    engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(kv_cache_memory_mb=16)
    engine.start(str(folder), 64, adapter_rank=RANK)
    yield engine
    engine.close()


@pytest.fixture
def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def with_adapter(base: Any, folder: Path, seed: int) -> tuple[Adapter, Any]:
    """An adapter as PEFT would save it, and the weights that it comes to: W + alpha / rank * B A."""
    generator = torch.Generator().manual_seed(seed)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    weights: list[tuple[str, Tensor]] = []
    with torch.no_grad():
        merged.load_state_dict(base.state_dict())
        for name, module in merged.named_modules():
            if name.endswith(tuple(TARGETS)):
                a = torch.randn(RANK, module.in_features, generator=generator) * 0.2
                b = torch.randn(module.out_features, RANK, generator=generator) * 0.2
                module.weight.add_(ALPHA / RANK * b @ a)
                weights += [(f"base_model.model.{name}.lora_{which}.weight", w) for which, w in (("A", a), ("B", b))]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": set(TARGETS), "bias": "none"}
    return Adapter(config, iter(weights)), merged


def test_an_adapter_stands_on_the_weights_until_others_come(engine: VLLMEngine, base: Any, folder: Path) -> None:
    files = set(Path("/dev/shm").iterdir())
    adapter, merged = with_adapter(base, folder, seed=1)
    with pytest.raises(EngineError, match="load_adapter was called on an engine that has no weights"):
        engine.load_adapter(adapter, 3)
    engine.load_weights(base.named_parameters(), 3)
    assert largest_gap(base, play(engine)) < 1e-4
    engine.load_adapter(adapter, 4)
    done = play(engine)
    assert largest_gap(merged, done) < 1e-4
    assert largest_gap(base, done) > 0.1
    assert done[0].versions == [VersionSpan(4, 8)]
    update(base, torch.Generator().manual_seed(2))
    engine.load_weights(base.named_parameters(), 5)
    assert largest_gap(base, play(engine)) < 1e-4
    adapter, merged = with_adapter(base, folder, seed=3)
    engine.load_adapter(adapter, 6)
    assert largest_gap(merged, play(engine)) < 1e-4
    assert set(Path("/dev/shm").iterdir()) == files


def test_an_adapter_that_comes_in_flight_replaces_the_one_before(engine: VLLMEngine, base: Any, folder: Path) -> None:
    engine.load_weights(base.named_parameters(), 1)
    (first, old), (second, new) = (with_adapter(base, folder, seed) for seed in (1, 2))
    engine.submit(Request("without", PROMPTS[0], 9, Sampling(), 0))
    with pytest.raises(EngineError, match="load_adapter was called with 1 requests pending"):
        engine.load_adapter(first, 2)
    engine.abort(["without"])
    engine.load_adapter(first, 2)
    engine.submit(Request("with", PROMPTS[0], 9, Sampling(), 0))
    for _ in range(4):
        engine.step()
    with pytest.raises(EngineError, match="load_weights was called with 1 requests pending"):
        engine.load_weights(base.named_parameters(), 3)
    engine.load_adapter(second, 3)
    while not (done := engine.step()):
        pass
    assert done[0].versions == [VersionSpan(2, 4), VersionSpan(3, 5)]
    ids = torch.tensor(done[0].response_ids)[:, None]
    before, after = (exact_logprobs(each, PROMPTS[0], done[0].response_ids).gather(1, ids)[:, 0] for each in (old, new))
    torch.testing.assert_close(torch.tensor(done[0].logprobs), torch.cat([before[:4], after[4:]]), atol=5e-5, rtol=0)


def test_an_adapter_that_cannot_be_read_leaves_no_policy(engine: VLLMEngine, base: Any, folder: Path) -> None:
    engine.load_weights(base.named_parameters(), 1)
    adapter, _ = with_adapter(base, folder, 1)
    with pytest.raises(EngineError, match=r"vLLM failed: .*DoRA"):
        engine.load_adapter(Adapter({**adapter.config, "use_dora": True}, adapter.weights), 2)
    assert engine.policy_version == -1


def test_vllm_sets_aside_the_next_size_of_adapters_that_it_knows() -> None:
    assert [adapter_settings(rank)["max_lora_rank"] for rank in (1, 2, 8, 9, 500)] == [1, 8, 8, 16, 512]
    with pytest.raises(ConfigError, match="an adapter of rank 513 is too large for vLLM, which takes up to 512"):
        adapter_settings(513)
