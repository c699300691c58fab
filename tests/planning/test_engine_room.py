"""What an engine takes of a device, by hand for Qwen3-4B: 36 layers, 8 heads of keys and values, 128 numbers each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from lit_stepwise.engines import AutoEngine, TransformersEngine, VLLMEngine, VLLMServerEngine
from lit_stepwise.planning.architectures import KNOWN
from lit_stepwise.planning.assumptions import Assumptions
from lit_stepwise.planning.engine import engine_room
from lit_stepwise.planning.machine import GIB, Machine

CONFIG = AutoConfig.for_model(**KNOWN["Qwen/Qwen3-4B"])
NUM_PARAMETERS = 4_000_000_000
GPUS = Machine("gpu", 8, 1, 80 * GIB, "")
ASSUME = Assumptions(engine_overhead_gib=3.0, engine_asleep_gib=1.25)


def room(engine, machine=GPUS):
    return engine_room(engine, CONFIG, NUM_PARAMETERS, machine, ASSUME)


@pytest.mark.parametrize(("span", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1)])
def test_heads_are_dealt_out_to_the_devices_of_an_engine_and_repeated_beyond(span, heads):
    found = room(VLLMEngine(dtype="bfloat16", tensor_parallel_size=span))
    assert found.bytes_per_token == 2 * 36 * heads * 128 * 2
    assert found.weights == 2 * NUM_PARAMETERS / span


def test_the_cache_is_what_the_share_of_the_gpu_leaves():
    found = room(VLLMEngine(dtype="bfloat16", tensor_parallel_size=2, gpu_memory_utilization=0.7))
    cache = 0.7 * 80 * GIB - NUM_PARAMETERS - 3 * GIB
    assert found.cache == pytest.approx(cache)
    assert found.tokens == int(cache / 73728)
    assert found.sequences(1000) == found.tokens / 1000
    assert (found.awake, found.asleep) == (pytest.approx(56 * GIB), 1.25 * GIB)


def test_a_cache_of_given_size_and_no_sleep():
    engine = VLLMEngine("bfloat16", kv_cache_memory_mb=2048, engine_kwargs={"enable_sleep_mode": False})
    found = room(engine)
    assert found.cache == 2 * GIB
    assert found.awake == found.asleep == 2 * NUM_PARAMETERS + 3 * GIB + 2 * GIB


def test_no_cache_at_all_holds_no_token():
    assert room(VLLMEngine(dtype="float32", gpu_memory_utilization=0.1)).tokens == 0


def test_auto_is_the_dtype_of_the_checkpoint_on_a_gpu_and_float32_on_a_cpu():
    assert room(VLLMEngine()).weights == 2 * NUM_PARAMETERS
    on_cpu = room(VLLMEngine(), Machine("cpu", 1, 1, 80 * GIB, ""))
    assert on_cpu.weights == 4 * NUM_PARAMETERS
    assert on_cpu.awake == on_cpu.asleep == 4 * NUM_PARAMETERS + 256 * 2**20


def test_engines_that_are_elsewhere_or_unknown_take_nothing():
    found = room(VLLMServerEngine(urls=["http://127.0.0.1:9"]))
    assert (found.awake, found.asleep, found.is_known, found.tokens) == (0, 0, False, 0)


def test_transformers_has_its_weights_alone(monkeypatch):
    found = room(TransformersEngine(dtype="float32"))
    assert (found.weights, found.awake, found.cache) == (4 * NUM_PARAMETERS, 4 * NUM_PARAMETERS, 0)
    monkeypatch.setattr("lit_stepwise.planning.engine.find_spec", lambda name: None)
    assert room(AutoEngine()).name == "TransformersEngine"
    monkeypatch.setattr("lit_stepwise.planning.engine.find_spec", lambda name: SimpleNamespace())
    assert room(AutoEngine()).name == "VLLMEngine"


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen/Qwen3-0.6B", 0.596), ("Qwen/Qwen3-4B", 4.022), ("Qwen/Qwen2.5-Coder-7B-Instruct", 7.616)],
)
def test_known_models_have_the_weights_that_their_cards_say(name, billions):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**KNOWN[name]))
    assert sum(each.numel() for each in model.parameters()) / 1e9 == pytest.approx(billions, abs=5e-4)
