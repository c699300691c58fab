"""vLLM on its own, in a process of its own, loads the folder and says what the trainer would."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_stepwise.export.command import export
from lit_stepwise.training import Lora

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed"),
]
PROMPT, RESPONSE = [5, 6, 7, 31], [8, 9, 250]


@pytest.fixture(scope="module")
def cases(tiny_model: Path, qwen2: Path, make_run: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name what the trainer says of ``RESPONSE`` after ``PROMPT``, [R], and what vLLM does."""
    folder = tmp_path_factory.mktemp("out")
    runs = {"tied": make_run(tiny_model), "untied": make_run(qwen2)}
    runs["adapter"] = make_run(tiny_model, Lora(rank=3, alpha=5))
    for name, run in runs.items():
        words = {"adapter": "separate"} if name == "adapter" else {"dtype": "float32"}
        export(str(run.checkpoint), str(folder / name), **words)
    words = [folder / "tied", folder / "untied", f"{tiny_model}:{folder / 'adapter'}"]
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)], env={**os.environ, **environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {
        name: (runs[name].module.score([(PROMPT, RESPONSE)])[0][0], torch.tensor(s))
        for name, s in zip(runs, said, strict=True)
    }


@pytest.mark.parametrize("name", ["tied", "untied", "adapter"])
def test_vllm_gives_the_logprobs_of_the_trainer(name: str, cases: dict[str, Any]) -> None:
    expected, found = cases[name]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def say(model: str, adapter: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=16 << 20,
        enable_lora=bool(adapter), max_lora_rank=8,
    )  # fmt: skip
    lora = LoRARequest("adapter", 1, adapter) if adapter else None
    settings = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (answer,) = engine.generate({"prompt_token_ids": PROMPT + RESPONSE}, settings, lora_request=lora)
    places = zip(answer.prompt_logprobs[len(PROMPT) :], RESPONSE, strict=True)
    print(json.dumps([each[token].logprob for each, token in places]), flush=True)


if __name__ == "__main__":
    for word in sys.argv[1:]:
        say(*word.partition(":")[::2])
