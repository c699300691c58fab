"""The engine against servers that are not vLLM but can misbehave in every way."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from lit_stepwise.engines import VLLMServerEngine
from lit_stepwise.engines.server.protocol import check_here, plain_config
from lit_stepwise.errors import ConfigError, EngineError
from lit_stepwise.types import Completion, Request, Sampling, VersionSpan
from tests.waiting import wait_until

pytestmark = pytest.mark.clock

MAX_CONTEXT = 100


class FakeServer:
    """Answers as vLLM does, unless ``faults`` has something else for a path. ``calls`` keeps what it was asked."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.facts = {
            "config": config,
            "max_context_tokens": MAX_CONTEXT,
            "dtype": "float32",
            "device": "cpu",
            "logprobs_mode": "processed_logprobs",
            "weights_backend": "file",
            "takes_seeds": True,
        }
        self.label = "default"
        self.calls: list[tuple[str, Any]] = []
        self.faults: dict[str, Callable[[], Any]] = {}
        self.files: list[tuple[str, int]] = []
        self.num_waiting = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.start()

    def start(self, port: int = 0) -> None:
        """Listen, at the port of before if it is given."""
        self._run(self._serve(port))

    def stop(self) -> None:
        """Close the socket and all connections."""
        self._run(self._runner.cleanup())

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _serve(self, port: int) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        path = str(request.rel_url)
        if path not in ("/health", "/weight_info"):
            self.calls.append((path, body))
        if fault := self.faults.get(request.path):
            self.num_waiting += 1
            try:
                answer = fault()
                answer = await answer if asyncio.iscoroutine(answer) else answer
            finally:
                self.num_waiting -= 1
            if isinstance(answer, web.StreamResponse):
                return answer
        return web.json_response(self._vllm(request.path, body))

    def _vllm(self, path: str, body: Any) -> Any:
        if path == "/update_weight_version":
            self.label = body["new_version"]
        if path == "/update_weights":
            file = body["update_info"]["path"]
            self.files.append((file, os.path.getsize(file)))
        answers = {
            "/collective_rpc": {"results": [self.facts]},
            "/weight_info": {"weight_version": self.label},
            "/reset_prefix_cache": {"success": True},
        }
        return self.sampled(body) if path == "/inference/v1/generate" else answers.get(path, {})

    def sampled(self, body: Any, labels: tuple[str, ...] = ()) -> Any:
        """Tokens 5, 6 and 7, or as many as are wanted; one label for each if they are given."""
        ids = [5, 6, 7][: body["sampling_params"]["max_tokens"]]
        content = [{"token_id": token, "logprob": -0.1 * token} for token in ids]
        spans = [{"version": label, "start": i, "end": i + 1} for i, label in enumerate(labels)]
        choice = {
            "token_ids": ids,
            "logprobs": {"content": content},
            "finish_reason": "stop",
            "weight_versions": spans or [{"version": self.label, "start": 0, "end": len(ids)}],
        }
        return {"choices": [choice], "usage": {"prompt_tokens_details": {"cached_tokens": 2}}}


@pytest.fixture
def config(tiny_model: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    return plain_config(AutoConfig.from_pretrained(tiny_model))


@pytest.fixture
def servers(config: dict[str, Any]) -> Iterator[list[FakeServer]]:
    made = [FakeServer(config) for _ in range(2)]
    yield made
    for server in made:
        server.close()


@pytest.fixture
def start(tiny_model: Path) -> Iterator[Callable[..., VLLMServerEngine]]:
    engines = []

    def make(servers: list[FakeServer], **settings: Any) -> VLLMServerEngine:
        given = {"reconnect_seconds": 1.0, "seed_requests": True, **settings}
        engine = VLLMServerEngine([server.url for server in servers], **given)
        engines.append(engine)
        engine.start(str(tiny_model), MAX_CONTEXT)
        return engine

    yield make
    for engine in engines:
        engine.close()


def ask(engine: VLLMServerEngine, *names: str, session: str = "", new: int = 3) -> None:
    for name in names:
        engine.submit(Request(name, [1, 2], new, Sampling(temperature=0.7, top_p=0.9, stop=("x",)), 2**63 + 4, session))


def wait(engine: VLLMServerEngine) -> list[Completion]:
    done = []
    while engine.num_pending:
        done += engine.step()
    return done


def weights(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()


def refuse(status: int, text: str = "no such thing") -> Callable[[], web.Response]:
    return lambda: web.Response(status=status, text=text)


async def forever() -> None:
    await asyncio.sleep(1000)


def test_a_request_travels_as_ids_and_comes_back_with_logprobs_and_versions(
    servers: list[FakeServer], start: Callable[..., VLLMServerEngine]
) -> None:
    engine = start(servers[:1])
    engine.begin_phase(9)
    ask(engine, "a")
    assert wait(engine) == [
        Completion("a", [5, 6, 7], [-0.5, pytest.approx(-0.6), pytest.approx(-0.7)], "stop", [VersionSpan(-1, 3)], 2)
    ]
    body = dict(servers[0].calls)["/inference/v1/generate"]
    assert body["token_ids"] == [1, 2]
    asked = body["sampling_params"]
    assert (asked["temperature"], asked["top_p"], asked["stop"], asked["max_tokens"]) == (0.7, 0.9, ["x"], 3)
    assert (asked["seed"], asked["logprobs"], asked["include_stop_str_in_output"]) == (4, 0, True)
    engine.begin_phase(9)
    ask(engine, "a", new=200)
    wait(engine)
    again = servers[0].calls[-1][1]
    assert again["cache_salt"] != body["cache_salt"]  # nothing cached is found in another phase
    assert again["sampling_params"]["max_tokens"] == 98
    with pytest.raises(EngineError, match=r"request b has a prompt of 100 tokens.*max_context_tokens=100"):
        engine.submit(Request("b", [1] * 100, 1, Sampling(), 0))


def test_a_session_stays_where_it_began_and_others_go_where_less_is_done(
    servers: list[FakeServer], start: Callable[..., VLLMServerEngine]
) -> None:
    engine = start(servers, seed_requests=False)
    engine.begin_phase(1)
    for server in servers:
        server.faults["/inference/v1/generate"] = forever
    ask(engine, "a", "b", "c", session="one")
    wait_until(lambda: servers[0].num_waiting == 3)
    for name in "def":
        ask(engine, name, session=name)
    wait_until(lambda: sum(server.num_waiting for server in servers) == 6)
    assert [server.paths.count("/inference/v1/generate") for server in servers] == [3, 3]
    assert servers[0].calls[-1][1]["sampling_params"]["seed"] is None
    engine.abort(["a", "b", "nobody"])
    wait_until(lambda: sum(server.num_waiting for server in servers) == 4)  # a closed connection ends a request
    assert (engine.num_pending, engine.step()) == (4, [])
    with pytest.raises(EngineError, match="begin_phase was called with 4 requests pending"):
        engine.begin_phase(2)
    engine.end_phase()
    assert engine.num_pending == 0
    wait_until(lambda: sum(server.num_waiting for server in servers) == 0)


def test_weights_go_to_all_servers_piece_by_piece_and_leave_nothing_behind(
    servers: list[FakeServer],
    start: Callable[..., VLLMServerEngine],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lit_stepwise.engines.server.weights.PIECE_BYTES", 100_000)
    engine = start(servers, weights_folder=str(tmp_path))
    engine.load_weights(weights(tiny_model).items(), 17)
    assert engine.policy_version == 17
    for server in servers:
        order = [path for path in server.paths if path != "/collective_rpc"]
        num_pieces = order.count("/update_weights")
        assert order == [
            "/pause?mode=keep&clear_cache=false",
            "/update_weight_version",
            "/start_weight_update",
            *["/update_weights"] * num_pieces,
            "/finish_weight_update",
            "/reset_prefix_cache?reset_running_requests=true",
            "/update_weight_version",
            "/resume",
        ]
        assert num_pieces > 2
        assert max(size for _, size in server.files) < 250_000
        assert server.label.endswith(":17")
    assert list(tmp_path.iterdir()) == []
    first = servers[0].label
    engine.begin_phase(1)
    mixed = lambda: web.json_response(  # noqa: E731
        servers[0].sampled({"sampling_params": {"max_tokens": 3}}, (first, first, first.replace(":17", ":18")))
    )
    servers[0].faults["/inference/v1/generate"] = mixed
    ask(engine, "a")
    versions = wait(engine)[0].versions
    assert [(span.policy_version, span.num_tokens) for span in versions] == [(17, 1), (17, 1), (18, 1)]


def test_a_failed_update_is_said_and_the_next_one_finishes_it_first(
    servers: list[FakeServer], start: Callable[..., VLLMServerEngine], tiny_model: Path, tmp_path: Path
) -> None:
    engine = start(servers, weights_folder=str(tmp_path))
    servers[1].faults["/update_weights"] = refuse(500, "cannot read that file")
    with pytest.raises(EngineError, match=rf"{servers[1].url} failed: HTTP 500 to /update_weights: cannot read that"):
        engine.load_weights(weights(tiny_model).items(), 3)
    assert engine.policy_version == -1
    assert list(tmp_path.iterdir()) == []
    assert "unfinished" in servers[0].label
    assert "/resume" not in servers[0].paths + servers[1].paths  # an engine with half of its weights plays nothing
    servers[1].faults = {}
    for server in servers:
        first = [refuse(500, "already active")]
        server.faults["/start_weight_update"] = lambda first=first: first.pop()() if first else None  # type: ignore[misc]
        server.calls.clear()
    engine.load_weights(weights(tiny_model).items(), 4)
    assert servers[0].paths[2:5] == ["/start_weight_update", "/finish_weight_update", "/start_weight_update"]
    servers[0].faults["/reset_prefix_cache"] = lambda: web.json_response({"success": False})
    with pytest.raises(EngineError, match="did not reset its prefix cache"):
        engine.load_weights(weights(tiny_model).items(), 5)
    with pytest.raises(EngineError, match=r"weights_folder=.*nowhere cannot be written"):
        start(servers, weights_folder=str(tmp_path / "nowhere")).load_weights(weights(tiny_model).items(), 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other": torch.zeros(1)}, "got other, which the engine's model does not have"),
        ({"model.norm.weight": torch.ones(3)}, r"model.norm.weight of \(3,\), not \(64,"),
        ({"model.norm.weight": None}, r"got no model.norm.weight; send every weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    servers: list[FakeServer],
    start: Callable[..., VLLMServerEngine],
    tiny_model: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    engine = start(servers)
    sent = {name: each for name, each in {**weights(tiny_model), **change}.items() if each is not None}
    with pytest.raises(EngineError, match=message):
        engine.load_weights(sent.items(), 1)
    assert engine.policy_version == -1


def test_what_a_server_cannot_do_for_this_trainer_is_said_at_start(
    servers: list[FakeServer], start: Callable[..., VLLMServerEngine], config: dict[str, Any]
) -> None:
    facts = servers[1].facts
    for change, message in [
        ({"config": {**config, "vocab_size": 9, "use_cache": False}}, "another model.*: vocab_size 9 there and 267 he"),
        ({"max_context_tokens": 99}, "takes 99 tokens.*max_context_tokens=100.*--max_context_tokens 100"),
        ({"logprobs_mode": "raw_logprobs"}, "reports raw_logprobs, but.*leave logprobs_mode out"),
        ({"takes_seeds": False}, "reads prompts in chunks.*enable_chunked_prefill out.*seed_requests: false"),
    ]:
        servers[1].facts = {**facts, **change}
        with pytest.raises(EngineError, match=rf"{servers[1].url} .*{message}"):
            start(servers)
    start(servers, seed_requests=False)
    servers[1].faults["/collective_rpc"] = refuse(404)
    with pytest.raises(EngineError, match=rf"{servers[1].url} .*HTTP 404.*start it with `lit-stepwise serve --model_p"):
        start(servers)
    servers[1].faults["/collective_rpc"] = lambda: web.Response(text="<html>It works!</html>", content_type="text/html")
    with pytest.raises(EngineError, match=r"said 'None' when it was asked what it serves.*lit-stepwise serve"):
        start(servers)
    servers[1].stop()
    with pytest.raises(EngineError, match=rf"{servers[1].url} failed: .*Cannot connect.*lit-stepwise serve"):
        start(servers)
    servers[1].start(servers[1].port)


def test_a_request_whose_server_is_gone_is_played_by_another(
    servers: list[FakeServer], start: Callable[..., VLLMServerEngine]
) -> None:
    engine = start(servers)
    engine.begin_phase(1)
    servers[0].faults["/inference/v1/generate"] = forever
    ask(engine, "a", "b", session="one")
    wait_until(lambda: servers[0].num_waiting == 2)
    servers[0].stop()
    assert [each.request_id for each in wait(engine)] in (["a", "b"], ["b", "a"])
    assert servers[1].paths.count("/inference/v1/generate") == 2
    servers[0].start(servers[0].port)


def test_a_server_that_comes_back_in_time_is_asked_again_and_one_that_does_not_is_named(
    servers: list[FakeServer], start: Callable[..., VLLMServerEngine]
) -> None:
    engine = start(servers[:1], reconnect_seconds=3.0)
    engine.begin_phase(1)
    servers[0].faults["/inference/v1/generate"] = forever
    ask(engine, "a")
    wait_until(lambda: servers[0].num_waiting == 1)
    servers[0].stop()
    time.sleep(0.3)
    servers[0].faults = {}
    servers[0].start(servers[0].port)
    assert len(wait(engine)) == 1
    servers[0].stop()
    began = time.monotonic()
    ask(engine, "b")
    with pytest.raises(
        EngineError, match=rf"no server was reached for reconnect_seconds=3: {servers[0].url}: .*Cannot connect"
    ):
        wait(engine)
    assert 3 < time.monotonic() - began < 20
    servers[0].start(servers[0].port)


def test_a_server_that_comes_back_with_other_weights_is_never_sampled_from(
    servers: list[FakeServer], start: Callable[..., VLLMServerEngine], tiny_model: Path
) -> None:
    engine = start(servers[:1])
    engine.load_weights(weights(tiny_model).items(), 5)
    ours = servers[0].label
    engine.begin_phase(1)
    servers[0].label = "default"
    ask(engine, "a")  # nobody saw that it was away
    with pytest.raises(EngineError, match="sampled with the weights 'default', which are not those it was given"):
        wait(engine)
    with pytest.raises(EngineError, match="has the weights 'default'"):
        engine.begin_phase(2)
    servers[0].label = ours
    servers[0].faults["/inference/v1/generate"] = forever
    ask(engine, "b")
    wait_until(lambda: servers[0].num_waiting == 1)
    servers[0].stop()
    servers[0].label = "default"
    servers[0].start(servers[0].port)
    with pytest.raises(EngineError, match="has the weights 'default', which are not those it was given"):
        wait(engine)
    assert servers[0].paths.count("/inference/v1/generate") == 2
    servers[0].label = ours
    servers[0].faults["/weight_info"] = lambda: web.json_response(["?"])
    with pytest.raises(EngineError, match=r"failed: HTTP 200 to /weight_info: \['\?'\]"):
        engine.begin_phase(2)
    servers[0].faults = {}
    with pytest.raises(EngineError, match=r"has the weights .*:5', which are not"):
        start(servers[:1]).begin_phase(1)  # weights of another run are not the checkpoint


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (refuse(400, "Token id 9 is out of vocabulary"), "refused a request: HTTP 400 .*Token id 9 is out of vocab"),
        (refuse(500, "out of memory"), "refused a request: HTTP 500 .*out of memory"),
        (lambda: web.Response(text="{'no': json", content_type="application/json"), "HTTP 200 .*no JSON"),
        (lambda: web.json_response({"choices": []}), "answered .*which is not what vLLM 0.32 says"),
        (lambda: web.Response(text="hello", content_type="text/html"), "answered 'None', which is not what vLLM"),
        (
            lambda: web.json_response(
                {"choices": [{"token_ids": [1, 2], "logprobs": {"content": [{"token_id": 1, "logprob": -1.0}]}}]}
            ),
            "logprobs of other tokens than it sampled",
        ),
        (
            lambda: web.json_response(
                {"choices": [{"token_ids": [1], "logprobs": {"content": [{"token_id": 1, "logprob": -9999.0}]}}]}
            ),
            "not finite; the weights have diverged",
        ),
    ],
)
def test_an_answer_that_is_none_is_said(
    servers: list[FakeServer], start: Callable[..., VLLMServerEngine], fault: Callable[[], Any], message: str
) -> None:
    engine = start(servers[:1], reconnect_seconds=0.5)
    engine.begin_phase(1)
    servers[0].faults["/inference/v1/generate"] = fault
    ask(engine, "a")
    with pytest.raises(EngineError, match=message):
        wait(engine)
    again = servers[0].paths.count("/inference/v1/generate") > 1
    assert again == ("HTTP 500" in message)  # what may pass is tried again


@pytest.mark.parametrize(
    ("faults", "settings", "message"),
    [
        (("/inference/v1/generate", "/health"), {}, r"no server was reached.*no sign of life"),
        (("/inference/v1/generate", "/weight_info"), {"health_seconds": 0.5}, "its engine has not answered for 0.5 s"),
    ],
)
def test_a_server_that_hangs_is_named(
    servers: list[FakeServer],
    start: Callable[..., VLLMServerEngine],
    tiny_model: Path,
    faults: tuple[str, ...],
    settings: dict[str, Any],
    message: str,
) -> None:
    engine = start(servers[:1], **settings)
    engine.begin_phase(1)
    servers[0].faults = dict.fromkeys((*faults, "/start_weight_update"), forever)
    began = time.monotonic()
    ask(engine, "a")
    with pytest.raises(EngineError, match=message):
        wait(engine)
    with pytest.raises(EngineError, match=message.removeprefix("no server was reached.*")):
        engine.load_weights(weights(tiny_model).items(), 1)
    assert time.monotonic() - began < 9


RANK = """
import sys
import torch, torch.distributed as dist
from lit_stepwise import serve
from lit_stepwise.engines import VLLMServerEngine
from lit_stepwise.errors import EngineError
from lit_stepwise.types import Request, Sampling
from transformers import AutoModelForCausalLM

rank, store, path, urls = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

def gathered():  # as sharded weights are: all ranks put each of them together
    for name, weight in AutoModelForCausalLM.from_pretrained(path).named_parameters():
        dist.all_reduce(weight.detach())
        yield name, weight

engine = VLLMServerEngine(urls, reconnect_seconds=0.5)
engine.start(path, 100)
engine.load_weights(gathered(), 7)
engine.begin_phase(1)
engine.submit(Request("a", [rank + 1], 3, Sampling(), 0))
while engine.num_pending:
    for each in engine.step():
        print([(span.policy_version, span.num_tokens) for span in each.versions], flush=True)
sys.stdin.readline()
try:
    engine.load_weights(gathered(), 8)
except EngineError as error:
    print(error, flush=True)
engine.close()
dist.destroy_process_group()
"""


def test_ranks_share_the_servers_and_the_first_alone_sends_weights(
    servers: list[FakeServer], tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    words = [str(tmp_path / "store"), str(tiny_model), *(server.url for server in servers)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), *words], **pipes) for rank in range(2)]
    request.addfinalizer(lambda: [rank.kill() for rank in ranks])
    assert [rank.stdout.readline() for rank in ranks] == ["[(7, 3)]\n"] * 2
    asked = [dict(server.calls)["/inference/v1/generate"]["token_ids"] for server in servers]
    assert asked == [[1], [2]]  # each rank begins with another server
    assert [server.paths.count("/resume") for server in servers] == [1, 1]
    servers[1].faults["/update_weights"] = refuse(500, "full")
    for rank in ranks:
        rank.stdin.write("go on\n")
        rank.stdin.flush()
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert said[0] == said[1]
    assert f"{servers[1].url} failed: HTTP 500 to /update_weights: full" in said[1]
    assert [rank.returncode for rank in ranks] == [0, 0]


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_servers=0"):
        VLLMServerEngine(num_servers=0)
    with pytest.raises(ConfigError, match=r"devices=\['1'\] with num_servers=2 and urls=None"):
        VLLMServerEngine(num_servers=2, devices=["1"])
    with pytest.raises(ConfigError, match="devices"):
        VLLMServerEngine(urls=["http://a:1"], devices=["1"])
    with pytest.raises(ConfigError, match="urls has node2:8000; write it in full, such as http://node2:8000"):
        VLLMServerEngine(urls=["node2:8000"])
    engine = VLLMServerEngine()
    with pytest.raises(EngineError, match="submit was called before start"):
        ask(engine, "a")
    with pytest.raises(EngineError, match=r"model\.model_path=/nowhere/at/all does not exist"):
        engine.start("/nowhere/at/all", MAX_CONTEXT)
    assert engine.description == "vLLM servers, not started"
    engine.close()


def test_weights_in_the_memory_of_this_machine_are_for_servers_on_it() -> None:
    check_here(
        ["http://127.0.0.1:8000", "http://localhost:1", "unix:/tmp/x/socket", f"http://{socket.gethostname()}:2"]
    )
    with pytest.raises(
        EngineError, match=r"^http://node7:8000 is on another machine .*rollout\.engine\.weights_folder"
    ):
        check_here(["http://localhost:8000", "http://node7:8000"])
