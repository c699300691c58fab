"""The engine against real vLLM servers, one that runs already and one of its own."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from lit_stepwise.engines import VLLMServerEngine
from lit_stepwise.errors import EngineError
from lit_stepwise.testing import exact_logprobs, save_tiny_model
from lit_stepwise.types import Completion, Request, Sampling, VersionSpan
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
MAX_CONTEXT = 640
PROMPTS = [[*range(first, first + 40)] for first in (1, 50, 100)]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 whose head is its embedding, and whose defaults for sampling must not count."""
    folder = save_tiny_model(tmp_path_factory.mktemp("tied"))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "top_k": 3, "do_sample": True}))
    return folder


@pytest.fixture(scope="module")
def untied(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 whose head is a weight of its own."""
    folder = tmp_path_factory.mktemp("untied")
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = Qwen2Config(
            vocab_size=267,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            initializer_range=0.3,
            eos_token_id=266,
            **small,
        )
        Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tied).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def serving(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``lit-stepwise serve``, where it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"model_path": str(tied), "port": port, "max_context_tokens": MAX_CONTEXT}
    log = tmp_path_factory.mktemp("log") / "log"
    code = (
        f"from pathlib import Path; from lit_stepwise.serve import serve; serve(**{settings}, log=Path({str(log)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as command:
        try:
            assert command.stdout is not None
            assert command.stdout.readline().startswith(f"ready: http://127.0.0.1:{port} serves {tied};"), (
                log.read_text()
            )
            yield f"http://127.0.0.1:{port}", command
        finally:
            command.terminate()


@pytest.fixture(scope="module")
def started(serving: tuple[str, Any], tied: Path) -> Iterator[VLLMServerEngine]:
    engine = VLLMServerEngine(urls=[serving[0]], seed_requests=True, reconnect_seconds=20.0)
    engine.start(str(tied), MAX_CONTEXT)
    yield engine
    engine.close()
    engine.close()


@pytest.fixture(scope="module")
def model(tied: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tied).eval()


@pytest.fixture
def engine(started: VLLMServerEngine, model: Any) -> Iterator[VLLMServerEngine]:
    started.load_weights(model.named_parameters(), 2)
    started.begin_phase(5)
    yield started
    started.end_phase()


def submit(engine: VLLMServerEngine, names: str, new: int, seed: int = 0, **sampling: Any) -> None:
    for index, name in enumerate(names):
        engine.submit(Request(name, PROMPTS[index % 3], new, Sampling(**sampling), seed=seed + index, session=name))


def wait(engine: VLLMServerEngine) -> list[Completion]:
    done = []
    while engine.num_pending:
        done += engine.step()
    return sorted(done, key=lambda completion: completion.request_id)


def gap(model: Any, done: list[Completion], temperature: float = 1.0) -> float:
    gaps = []
    for index, each in enumerate(done):
        table = exact_logprobs(model, PROMPTS[index % 3], each.response_ids, temperature)
        expected = table.gather(1, torch.tensor(each.response_ids)[:, None])[:, 0]
        gaps.append(float((torch.tensor(each.logprobs) - expected).abs().max()))
    return max(gaps)


def change(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def family(word: str) -> dict[int, str]:
    """The processes of the server that has ``word`` in its command, the one that minds it included: their names."""
    every = {int(each): name_of(int(each)) for each in os.listdir("/proc") if each.isdigit()}
    minded = {each for each, name in every.items() if word in name and "engines.server.main" in name}
    return {each: name for each, name in every.items() if each in minded or group_of(each) in minded}


def group_of(process: int) -> int:
    try:
        return os.getpgid(process)
    except ProcessLookupError:
        return 0


def name_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def shared_memory_of(processes: Iterable[int]) -> set[str]:
    lines = [line for each in processes for line in Path(f"/proc/{each}/maps").read_text().splitlines()]
    return {line.partition("/dev/shm/")[2] for line in lines if "/dev/shm/" in line and "(deleted)" not in line}


def test_logprobs_are_exact_after_every_update(started: VLLMServerEngine, model: Any) -> None:
    for version in range(20):
        change(model, version)
        started.load_weights(model.named_parameters(), version)
        started.begin_phase(version)
        submit(started, "abc", 6, temperature=0.7)
        done = wait(started)
        assert gap(model, done, 0.7) < 1e-4
        assert [each.versions for each in done] == [[VersionSpan(version, len(each.response_ids))] for each in done]
        assert [each.num_cached_tokens for each in done] == [0, 0, 0]  # what older weights computed is not found


def test_a_response_follows_its_seed_in_every_phase(engine: VLLMServerEngine, model: Any) -> None:
    submit(engine, "abc", 20, seed=7)
    first = wait(engine)
    assert gap(model, first) < 1e-4
    assert (
        max(
            exact_logprobs(model, PROMPTS[0], first[0].response_ids)
            .argsort(descending=True)
            .argsort()[range(len(first[0].response_ids)), first[0].response_ids]
        )
        >= 3
    )  # the top_k of the checkpoint does not count
    submit(engine, "a", 20, seed=7)
    assert wait(engine)[0].num_cached_tokens == 32  # of its own phase
    engine.begin_phase(5)
    submit(engine, "abc", 20, seed=7)
    assert wait(engine) == first
    submit(engine, "abc", 20, seed=8)
    assert [each.response_ids for each in wait(engine)] != [each.response_ids for each in first]


def test_weights_come_in_while_responses_are_sampled(engine: VLLMServerEngine, model: Any) -> None:
    mixed: list[Completion] = []
    for version, seconds in enumerate((0.1, 0.2, 0.4, 0.8), 3):  # a busy machine takes its time to begin
        submit(engine, "abcdefgh", 590, temperature=1.5)
        time.sleep(seconds)
        change(model, 77)
        engine.load_weights(model.named_parameters(), version)
        if mixed := [each for each in wait(engine) if len(each.versions) > 1]:
            break
    assert mixed
    for each in mixed:
        assert [span.policy_version for span in each.versions] == [version - 1, version]
    submit(engine, "abc", 12)
    assert gap(model, wait(engine)) < 1e-4
    index = "abcdefgh".index(mixed[0].request_id)
    new = mixed[0].versions[1].num_tokens  # sampled by the new weights, from a cache that they computed anew
    table = exact_logprobs(model, PROMPTS[index % 3], mixed[0].response_ids, 1.5)[-new:]
    expected = table.gather(1, torch.tensor(mixed[0].response_ids[-new:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(mixed[0].logprobs[-new:]), expected, atol=1e-4, rtol=0)


def test_what_is_aborted_comes_to_nothing_and_the_others_go_on(engine: VLLMServerEngine) -> None:
    submit(engine, "abc", 500)
    engine.abort(["a", "c"])
    assert [each.request_id for each in wait(engine)] == ["b"]
    submit(engine, "ac", 3)
    assert [len(each.response_ids) for each in wait(engine)] == [3, 3]


def test_stop_strings_and_ends_of_turn_end_a_response(engine: VLLMServerEngine, tied: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tied)
    submit(engine, "abcdefghi", 200, temperature=1.5, stop=("s",))
    for each in wait(engine):
        text = tokenizer.decode(each.response_ids)
        assert each.finish_reason == ("stop" if "s" in text or 266 in each.response_ids else "length")
        assert "s" not in tokenizer.decode(each.response_ids[:-1])


def test_a_file_that_a_server_cannot_see_is_said_and_the_engine_recovers(
    engine: VLLMServerEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", lambda piece, path: None)
        with pytest.raises(EngineError, match=r"http://127.* failed: HTTP 500 to /update_weights: .*No such file"):
            engine.load_weights(model.named_parameters(), 8)
    engine.load_weights(model.named_parameters(), 9)
    engine.begin_phase(1)
    submit(engine, "abc", 5)
    assert gap(model, wait(engine)) < 1e-4


def test_another_model_or_too_short_a_context_is_refused(serving: tuple[str, Any], tied: Path, untied: Path) -> None:
    engine = VLLMServerEngine(urls=[serving[0]], seed_requests=True)
    with pytest.raises(EngineError, match=r"serves another model.*hidden_act|intermediate_size 192 there and 96 here"):
        engine.start(str(untied), MAX_CONTEXT)
    with pytest.raises(EngineError, match=r"takes 640 tokens.*max_context_tokens=641"):
        engine.start(str(tied), MAX_CONTEXT + 1)
    engine.close()


def test_nothing_is_left_of_a_server_whose_command_was_killed(serving: tuple[str, Any], tied: Path) -> None:
    running = family(str(tied))
    assert sum("VLLM::" in name for name in running.values()) == 2
    serving[1].kill()
    wait_until(lambda: not any(map(name_of, running)))


@pytest.mark.clock
def test_an_engine_starts_servers_of_its_own_and_starts_them_anew_when_they_died(untied: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(untied).eval()
    engine = VLLMServerEngine(server_kwargs={"max_num_seqs": 32})
    try:
        for victim, exit_code in [("VLLM::EngineCore", None), (f"{sys.executable} -m", 137)]:
            engine.start(str(untied), MAX_CONTEXT)
            folder = engine._processes[0].url.removeprefix("unix:").removesuffix("/socket")
            for version in range(20 if exit_code else 2):
                change(model, 100 + version)
                engine.load_weights(model.named_parameters(), version)
                engine.begin_phase(version)
                submit(engine, "abc", 6)
                assert gap(model, wait(engine)) < 1e-4
            running = family(folder)
            assert engine._own_folder is not None
            in_memory = {*shared_memory_of(running), engine._own_folder.name}
            assert in_memory & set(os.listdir("/dev/shm")) == in_memory
            assert len(in_memory) > 1
            submit(engine, "abcdef", 500, temperature=1.5)
            os.kill(next(each for each, name in running.items() if name.startswith(victim)), signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(EngineError, match=f"exit code {exit_code}" if exit_code else "its log ends with"):
                play_on(engine)
            assert time.monotonic() - began < 10
            engine.close()
            assert not any(map(name_of, running))
            assert not Path(folder).exists()
            assert not in_memory & set(os.listdir("/dev/shm"))
    finally:
        engine.close()


def play_on(engine: VLLMServerEngine) -> None:
    while True:
        for each in engine.step():
            submit(engine, each.request_id, 500)
