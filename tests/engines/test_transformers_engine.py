from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config

from lit_stepwise.engines.rows import row_dtype
from lit_stepwise.engines.sampling import Ends, sample
from lit_stepwise.engines.transformers import TransformersEngine
from lit_stepwise.errors import ConfigError, EngineError
from lit_stepwise.testing import exact_logprobs, save_tiny_model
from lit_stepwise.types import Completion, Request, Sampling, VersionSpan

MAX_CONTEXT = 160
END = 266  # <|im_end|>
PROMPTS = [[(7 * row + 3 * column) % 250 for column in range(9 + 11 * row)] for row in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def engine(folder: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine()
    engine.start(str(folder), MAX_CONTEXT)
    yield engine
    engine.close()


def request(name: object, prompt: list[int], new: int = 12, seed: int = 0, **sampling: Any) -> Request:
    return Request(str(name), prompt, new, Sampling(**{"stop": (), **sampling}), seed)


def play(engine: TransformersEngine, requests: list[Request]) -> dict[str, Completion]:
    for each in requests:
        engine.submit(each)
    return finish(engine)


def finish(engine: TransformersEngine) -> dict[str, Completion]:
    done = []
    while engine.num_pending:
        done += engine.step()
    return {completion.request_id: completion for completion in done}


def moved(model: Any, scale: float = 0.05) -> Any:
    """The model as it may be some updates later."""
    later, generator = deepcopy(model), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return later


def assert_exact(model: Any, prompt: list[int], completion: Completion, temperature: float = 1.0) -> None:
    table = exact_logprobs(model, prompt, completion.response_ids, temperature)
    expected = table.gather(1, torch.tensor(completion.response_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


def test_logprobs_are_those_of_a_full_forward_pass_on_the_exact_ids(engine: TransformersEngine, model: Any) -> None:
    done = play(engine, [request(i, prompt, seed=i) for i, prompt in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        assert_exact(model, prompt, done[str(i)])
    assert len({tuple(completion.response_ids) for completion in done.values()}) == len(PROMPTS)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_other_decoders_work_as_well(tmp_path: Path, folder: Path, config: Any) -> None:
    settings = config(
        vocab_size=267, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=MAX_CONTEXT, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=266, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(settings).eval()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    engine = TransformersEngine()
    engine.start(str(tmp_path), MAX_CONTEXT)
    done = play(engine, [request(i, prompt, seed=i) for i, prompt in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        assert_exact(model, prompt, done[str(i)])


def test_a_response_does_not_depend_on_who_joins_and_leaves_the_batch(folder: Path) -> None:
    requests = [request(i, prompt, new=4 + 5 * (i % 3), seed=i) for i, prompt in enumerate(PROMPTS)]
    alone = {}
    for each in requests:
        engine = TransformersEngine()
        engine.start(str(folder), MAX_CONTEXT)
        alone |= play(engine, [each])
    engine = TransformersEngine(max_batch_size=3)  # so that rows are given up and taken again
    engine.start(str(folder), MAX_CONTEXT)
    together, waiting = [], list(requests)
    while waiting or engine.num_pending:
        if waiting:  # one joins with every step
            engine.submit(waiting.pop())
        together += engine.step()
    assert len(together) == len(requests)
    for completion in together:
        assert completion.response_ids == alone[completion.request_id].response_ids
        assert completion.logprobs == pytest.approx(alone[completion.request_id].logprobs, abs=1e-5)
        assert completion.finish_reason == alone[completion.request_id].finish_reason


def test_the_seed_of_a_request_alone_decides(engine: TransformersEngine) -> None:
    done = play(engine, [request(name, PROMPTS[3], seed=seed) for name, seed in [("a", 5), ("b", 5), ("c", 6)]])
    assert done["a"].response_ids == done["b"].response_ids != done["c"].response_ids
    engine.begin_phase(77)
    assert play(engine, [request("d", PROMPTS[3], seed=5)])["d"].response_ids == done["a"].response_ids


def test_tokens_are_drawn_as_often_as_the_distribution_says(engine: TransformersEngine, model: Any) -> None:
    prompt, count = PROMPTS[2], 3000
    done = play(engine, [request(i, prompt, new=1, seed=i, temperature=1.3) for i in range(count)])
    drawn = torch.bincount(torch.tensor([each.response_ids[0] for each in done.values()]), minlength=267) / count
    expected = exact_logprobs(model, prompt, [0], 1.3)[0].exp()
    assert (drawn - expected).abs().max() < 0.03  # four standard deviations of the likeliest token
    assert expected.max() > 0.05


def test_temperature_divides_the_logits(engine: TransformersEngine, model: Any) -> None:
    assert_exact(model, PROMPTS[1], play(engine, [request(0, PROMPTS[1], temperature=0.7)])["0"], temperature=0.7)


def test_temperature_zero_is_greedy_with_the_logprobs_of_temperature_one(
    engine: TransformersEngine, model: Any
) -> None:
    mixed = [request(0, PROMPTS[1], temperature=0, top_p=0.3), request(1, PROMPTS[2], temperature=0.5, top_p=0.9)]
    completion = play(engine, mixed)["0"]
    table = exact_logprobs(model, PROMPTS[1], completion.response_ids)
    assert list(completion.response_ids) == table.argmax(-1).tolist()
    assert completion.logprobs == pytest.approx(table.max(-1).values.tolist(), abs=1e-5)


def test_top_p_renormalises_what_it_keeps(engine: TransformersEngine, model: Any) -> None:
    completion = play(engine, [request(0, PROMPTS[1], new=30, temperature=1.2, top_p=0.6)])["0"]
    table = exact_logprobs(model, PROMPTS[1], completion.response_ids, 1.2)
    for row, token, logprob in zip(table, completion.response_ids, completion.logprobs, strict=True):
        order = row.argsort(descending=True).tolist()
        kept = next(count for count in range(1, 268) if row[order[:count]].exp().sum() >= 0.6)
        assert token in order[:kept]
        assert logprob == pytest.approx(float(row[token] - row[order[:kept]].logsumexp(0)), abs=1e-5)


def test_sampling_inverts_the_distribution_function_as_worked_by_hand() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    expected = {0.0: 0, 0.05: 0, 0.15: 1, 0.59: 1, 0.61: 2, 0.76: 3, 0.999: 3}
    uniforms = np.array(list(expected))
    one = np.ones(len(expected), dtype=np.float32)
    tokens, logprobs = sample(probabilities.log().expand(len(expected), -1), one, one, uniforms)
    assert tokens.tolist() == list(expected.values())
    assert np.exp(logprobs) == pytest.approx([0.1, 0.1, 0.5, 0.5, 0.15, 0.25, 0.25])
    # of a nucleus of 0.7 only 0.5 and 0.25 are left
    tokens, logprobs = sample(probabilities.log().expand(len(expected), -1), one, one * 0.7, uniforms)
    assert tokens.tolist() == [1, 1, 1, 1, 1, 3, 3]
    assert np.exp(logprobs) == pytest.approx([2 / 3] * 5 + [1 / 3] * 2)


def test_the_end_of_turn_token_ends_a_response_and_stays_in_it(engine: TransformersEngine) -> None:
    done = play(engine, [request(i, PROMPTS[i % 8][:50], new=60, seed=i) for i in range(40)])
    stopped = [each for each in done.values() if each.finish_reason == "stop"]
    assert 3 < len(stopped) < 37
    for each in done.values():
        ids = list(each.response_ids)
        assert ids.count(END) == (each in stopped)
        assert ids[-1] == END if each in stopped else len(ids) == 60


def test_a_stop_string_ends_a_response_and_changes_nothing_before_it(
    engine: TransformersEngine, tokenizer: Any
) -> None:
    requests = [request(i, PROMPTS[i % 8][:50], new=40, seed=i) for i in range(40)]
    free = play(engine, requests)
    cut = play(engine, [replace(each, sampling=Sampling(stop=("no such thing", "s"))) for each in requests])
    pieces = set()
    for name, completion in cut.items():
        ids = list(free[name].response_ids)
        size = next((n for n in range(1, len(ids)) if "s" in tokenizer.decode(ids[:n])), len(ids))
        assert list(completion.response_ids) == ids[:size]
        assert list(completion.logprobs) == pytest.approx(list(free[name].logprobs)[:size], abs=1e-5)
        if size < len(ids):
            assert completion.finish_reason == "stop"
            pieces.add(tokenizer.decode(completion.response_ids[-1]))
    assert pieces & {"sq", "sql"}  # it ended inside of a token, all of which stays


@pytest.mark.parametrize(
    ("response", "stop"),
    [
        ("a > b</sql>\n", "</sql>"),  # its last token is ">\n", and an earlier ">" ends nothing
        ("SELECT s", "s"),  # a token " s"
        ("Ã caf\u00e9", "\u00e9"),  # two tokens, neither of which is a character
        ("one\ntwo\n\n", "\n\n"),
        ("the <|im_start|>", "<|im_start|>"),
    ],
)
def test_a_stop_string_is_seen_with_the_token_that_completes_it(
    model: Any, tokenizer: Any, response: str, stop: str
) -> None:
    ends, ids = Ends(tokenizer, model), tokenizer(response)["input_ids"]
    rows = np.zeros(1, row_dtype(64))
    rows["tokens"][0, : len(ids) + 9] = [*PROMPTS[0], *ids]
    ends.index(("something else",))
    rows["prompt"], rows["stop"] = 9, ends.index(("no such thing", stop))
    reached = []
    for size in range(1, len(ids) + 1):
        rows["length"] = 9 + size
        reached += ends.reached(rows).tolist()
    assert reached == [False] * (len(ids) - 1) + [True]


@pytest.mark.parametrize(("size", "room"), [(155, 5), (159, 1)])
def test_a_response_is_cut_to_the_room_that_the_prompt_leaves(engine: TransformersEngine, size: int, room: int) -> None:
    done = play(engine, [request("long", [1] * size, seed=1), request("short", [2] * 9, seed=1)])
    assert (len(done["long"].response_ids), done["long"].finish_reason) == (room, "length")
    assert len(done["short"].response_ids) == 12


def test_a_prompt_that_leaves_no_room_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(EngineError, match=r"request big has a prompt of 160 tokens.*max_context_tokens=160"):
        engine.submit(request("big", [1] * 160))
    assert engine.num_pending == 0


def test_what_finishes_together_comes_in_the_order_of_submission(engine: TransformersEngine) -> None:
    for name in "dbcae":
        engine.submit(request(name, PROMPTS["abcde".index(name)], new=1))
    assert engine.num_pending == 5
    assert [each.request_id for each in engine.step()] == list("dbcae")
    assert engine.num_pending == 0
    assert engine.step() == []


def test_a_long_prompt_is_computed_in_parts(
    engine: TransformersEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_stepwise.engines.transformers._PREFILL_TOKENS", 20)
    done = play(engine, [request(i, prompt, seed=i) for i, prompt in enumerate(PROMPTS)])
    for i, prompt in enumerate(PROMPTS):
        assert_exact(model, prompt, done[str(i)])


def test_the_next_turn_reads_only_what_is_new(folder: Path, model: Any) -> None:
    engine = TransformersEngine(max_batch_size=5)  # with no row to spare each must go on in its own
    engine.start(str(folder), MAX_CONTEXT)
    prompts = dict(enumerate(PROMPTS[:5]))
    for turn in range(3):
        prompts = dict(reversed(prompts.items()))
        done = play(engine, [request(i, prompt, new=5 + i, seed=10 * turn + i) for i, prompt in prompts.items()])
        for i, prompt in prompts.items():
            assert_exact(model, prompt, done[str(i)])
            # all of the last prompt and its response but for the last token, which nobody has read yet
            assert done[str(i)].num_cached_tokens == (len(prompt) - 4 if turn else 0)
            prompts[i] = [*prompt, *done[str(i)].response_ids, 7, 8, 9]


def test_attempts_at_one_task_share_its_prompt(engine: TransformersEngine, model: Any) -> None:
    done = play(engine, [request(i, PROMPTS[4], seed=i) for i in range(4)])
    assert [done[str(i)].num_cached_tokens for i in range(4)] == [0, 52, 52, 52]
    for completion in done.values():
        assert_exact(model, PROMPTS[4], completion)
    engine.begin_phase(1)
    assert play(engine, [request(0, PROMPTS[4])])["0"].num_cached_tokens == 0


@pytest.mark.parametrize("tied", [True, False])
def test_loaded_weights_are_the_ones_that_sample(tmp_path: Path, tied: bool) -> None:
    folder = save_tiny_model(tmp_path, seed=1, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    engine = TransformersEngine()
    engine.start(str(folder), MAX_CONTEXT)
    assert engine.policy_version == -1
    before = play(engine, [request(0, PROMPTS[3])])["0"]
    later = moved(model)
    engine.load_weights(later.named_parameters(), 17)
    after = play(engine, [request(0, PROMPTS[3])])["0"]
    assert after.logprobs != before.logprobs
    assert_exact(later, PROMPTS[3], after)
    assert (before.versions, after.versions) == ([VersionSpan(-1, 12)], [VersionSpan(17, 12)])
    assert engine.policy_version == 17
    assert after.num_cached_tokens == 0


def test_weights_that_come_in_flight_sample_the_rest_and_read_nothing_older(
    engine: TransformersEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_stepwise.engines.transformers._PREFILL_TOKENS", 40)  # so that it takes several chunks
    later = moved(model)
    engine.load_weights(model.named_parameters(), 3)
    for i, prompt in enumerate(PROMPTS):
        engine.submit(request(i, prompt, seed=90 + i))
    done = {each.request_id: each for _ in range(5) for each in engine.step()}
    engine.load_weights(later.named_parameters(), 7)
    engine.submit(request("late", PROMPTS[4], seed=99))
    done |= finish(engine)
    assert done["late"].versions == [VersionSpan(7, 12)]
    assert done["late"].num_cached_tokens == 52  # of what was computed anew
    for i, prompt in enumerate(PROMPTS):
        assert done[str(i)].versions == [VersionSpan(3, 5), VersionSpan(7, 7)]
        ids = done[str(i)].response_ids
        tables = exact_logprobs(model, prompt, ids)[:5], exact_logprobs(later, prompt, ids)[5:]
        expected = torch.cat(tables).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done[str(i)].logprobs), expected, atol=1e-5, rtol=0)


def test_what_is_given_up_leaves_its_row_to_others_and_nothing_comes_of_it(folder: Path, model: Any) -> None:
    engine = TransformersEngine(max_batch_size=3)
    engine.start(str(folder), MAX_CONTEXT)
    for i, prompt in enumerate(PROMPTS):
        engine.submit(request(i, prompt, seed=90 + i))
    for _ in range(4):
        assert engine.step() == []
    engine.abort(["0", "6", "nobody"])  # in play, waiting, unknown
    assert engine.num_pending == 6
    done = finish(engine)
    assert sorted(done) == ["1", "2", "3", "4", "5", "7"]
    for name, completion in done.items():
        assert_exact(model, PROMPTS[int(name)], completion)
    for each in (request("1", PROMPTS[1]), request("1 again", PROMPTS[1])):
        engine.submit(each)
    engine.step()
    engine.abort(["1", "1 again"])
    assert engine.num_pending == 0
    assert play(engine, [request(1, PROMPTS[1])])["1"].num_cached_tokens == 19  # its row kept what it had computed
    engine.close()
    engine.abort(["1"])


def test_weights_of_both_names_of_a_tied_head_are_taken(engine: TransformersEngine, model: Any) -> None:
    engine.load_weights(model.state_dict().items(), 1)
    assert_exact(model, PROMPTS[3], play(engine, [request(0, PROMPTS[3])])["0"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "got no model.norm.weight; send every weight"),
        (lambda weights: weights.update(other=torch.zeros(1)), "got other, which the engine's model does not have"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(3)}),
            r"model.norm.weight of \(3,\), not \(64,",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    engine: TransformersEngine, model: Any, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    weights = dict(model.named_parameters())
    change(weights)
    with pytest.raises(EngineError, match=message):
        engine.load_weights(weights.items(), 1)
    assert engine.policy_version == -1


def test_a_phase_ends_with_what_is_pending_given_up(folder: Path) -> None:
    engine = TransformersEngine(max_batch_size=1)
    engine.end_phase()  # it may not even have started
    engine.start(str(folder), MAX_CONTEXT)
    for i in range(2):
        engine.submit(request(i, PROMPTS[i]))
    engine.step()
    with pytest.raises(EngineError, match="begin_phase was called with 2 requests pending; call end_phase first"):
        engine.begin_phase(0)
    engine.end_phase()
    assert engine.num_pending == 0
    engine.begin_phase(0)
    assert engine.step() == []


def test_diverged_weights_are_an_error(engine: TransformersEngine, model: Any) -> None:
    engine.load_weights([(name, value * torch.nan) for name, value in model.named_parameters()], 1)
    with pytest.raises(EngineError, match="not finite"):
        play(engine, [request(0, PROMPTS[0])])


def test_torch_s_generator_is_left_alone(folder: Path) -> None:
    state = torch.get_rng_state()
    engine = TransformersEngine()
    engine.start(str(folder), MAX_CONTEXT)
    play(engine, [request(0, PROMPTS[0])])
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_work_is_said_at_start(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(EngineError, match=r"model.model_path=/nowhere/at/all cannot be loaded"):
        TransformersEngine().start("/nowhere/at/all", MAX_CONTEXT)
    with pytest.raises(EngineError, match=r"rollout.limits.max_context_tokens=4096 is more.*use 2048 or less"):
        TransformersEngine().start(str(folder), 4096)
    config = MistralConfig(vocab_size=267, hidden_size=8, intermediate_size=8, num_hidden_layers=1, sliding_window=99)
    config.num_attention_heads = config.num_key_value_heads = 1
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="layers of sliding_attention"):
        TransformersEngine().start(str(tmp_path), MAX_CONTEXT)
    TransformersEngine().start(str(tmp_path), 99)
    with pytest.raises(ConfigError, match="max_batch_size=0"):
        TransformersEngine(max_batch_size=0)
    with pytest.raises(ConfigError, match=r"engine.dtype=float33"):
        TransformersEngine(dtype="float33")


def test_close_can_be_called_twice(engine: TransformersEngine) -> None:
    engine.close()
    engine.close()
    assert engine.num_pending == 0
    with pytest.raises(EngineError, match="before start"):
        engine.submit(request(0, PROMPTS[0]))
