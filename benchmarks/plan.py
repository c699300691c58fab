"""What `lit-stepwise plan` says of the memory of an optimizer step, beside what two processes took for one.

A Qwen3 of 96 million random weights is trained by the real Trainer on two CPU processes (gloo); mini-batches are such
that each rank has two micro-batches of the full budget. Tracked is the highest sum of all tensors that are alive in the
second step, as PyTorch's tracker of memory sees them in the real process. Allocated is what torch's allocator handed
out in all threads and did not get back, at most, in a run of its own. RSS is what the process grew by, at most, from
before the weights are read.

Products of bfloat16 take a CPU without AVX-512 hours; there they are zeros, which are as large.

    python benchmarks/plan.py > benchmarks/results/plan.txt
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from lit_stepwise.planning.attempts import Lengths, step_samples
from lit_stepwise.planning.machine import GIB, Machine
from lit_stepwise.planning.memory import Training, simulate
from lit_stepwise.planning.tracking import peak_of, tracker_of
from lit_stepwise.training import FSDP2Strategy, StepwiseModule
from lit_stepwise.types import Limits, MiniBatch, StepSample

VOCABULARY = 32768
IDS = ("prompt_ids", "response_ids")
BUDGET = 1024
LENGTHS = Lengths(prompt=256, response=100, thought=0, observation=56, turns=2)
LIMITS = Limits(max_prompt_tokens=256, max_context_tokens=512, max_new_tokens=100, max_turns=2)
CASES: dict[str, dict[str, Any]] = {
    "fsdp2": {"strategy": {}},
    "fsdp2, activation checkpointing": {"strategy": {}, "module": {"activation_checkpointing": True}},
    "fsdp2, the same, layers together": {
        "strategy": {"tensor_parallel_size": 2}, "module": {"activation_checkpointing": True},
    },
    "fsdp2, the same in bfloat16": {
        "strategy": {"param_dtype": "bfloat16"}, "module": {"activation_checkpointing": True},
    },
}  # fmt: skip
IS_SLOW = torch.backends.cpu.get_cpu_capability() != "AVX512"
"""In bfloat16."""


class Module(StepwiseModule):
    """Mini-batches stay where they are, as under a ``TaskDataModule``."""

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """The same batch."""
        return batch


class Tracked(Module):
    """Tracks its second step."""

    tracker: Any = None

    def training_step(self, batch: MiniBatch, batch_idx: int) -> None:
        """As always, but watched."""
        if batch_idx == 0:
            super().training_step(batch, batch_idx)
            return
        self.optimizers().zero_grad()  # type: ignore[union-attr]
        self.tracker = tracker_of(self.policy, self.optimizers().optimizer)  # type: ignore[arg-type, union-attr]
        with self.tracker:
            super().training_step(batch, batch_idx)

    def manual_backward(self, loss: Tensor, *arguments: Any, **settings: Any) -> None:
        """The tracker takes the next micro-batch for a step of its own."""
        super().manual_backward(loss, *arguments, **settings)
        if self.tracker is not None:
            self.tracker.reset_mod_stats()


class ZerosForProducts(TorchDispatchMode):
    """Of bfloat16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Nothing is computed, and all of it allocated."""
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.bfloat16:
            return args[0].new_zeros(len(args[0]), args[1].shape[1])
        return func(*args, **kwargs or {})


def samples(group: int) -> list[StepSample]:
    """Three attempts of two turns at one task: a tree of ``BUDGET`` nodes."""
    made = step_samples(LENGTHS, LIMITS, "append", "step", 1, 3)
    return [
        replace(each, group=group, **{name: [token % VOCABULARY for token in getattr(each, name)] for name in IDS})
        for each in made
    ]


def setting(name: str, folder: str, kind: type[StepwiseModule]) -> tuple[StepwiseModule, Any]:
    case = CASES[name]
    module = kind(folder, max_tokens_per_micro_batch=BUDGET, **case.get("module", {}))
    return module, FSDP2Strategy(**case["strategy"])


def predicted(name: str, folder: str) -> dict[str, float]:
    module, strategy = setting(name, folder, Module)
    module.reads_weights = False
    machine = Machine("cpu", 2, 1, 0.0, "")
    memory = simulate(Training(module, machine, strategy, "32-true"), samples(0))
    return {"peak": memory.peak / GIB}


def join(rank: int, meeting: str) -> None:
    """One of two processes."""
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", world_size=2, rank=rank)


def fit(name: str, folder: str, kind: type[StepwiseModule]) -> StepwiseModule:
    """Two optimizer steps."""
    module, strategy = setting(name, folder, kind)
    batches = [MiniBatch([each for group in range(4) for each in samples(group)], 0, step) for step in range(2)]
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)
    with ZerosForProducts() if "bfloat16" in name and IS_SLOW else nullcontext():
        trainer.fit(module, loader)
    return module


def measured(name: str, folder: str) -> dict[str, float]:
    """By the tracker, and by Linux."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest RSS so far
    before = status("VmRSS")
    module = fit(name, folder, Tracked)
    assert isinstance(module, Tracked)
    return {"tracked": peak_of(module.tracker)["Total"] / GIB, "rss": (status("VmHWM") - before) / GIB}


def allocated(name: str, folder: str) -> dict[str, float]:
    """By the allocator."""
    # gloo's threads give up much of what it copies, and are not profiled; with this the allocator counts them, too
    library = ctypes.CDLL(f"{torch.__path__[0]}/lib/libc10.so")
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fit(name, folder, Module)
    most, left = 0, [*profiler.profiler.kineto_results.experimental_event_tree()]  # type: ignore[union-attr]
    while left:
        event = left.pop()
        left += event.children
        most = max(most, getattr(event.extra_fields, "total_allocated", 0))
    return {"allocated": most / GIB}


def status(name: str) -> int:
    """Bytes, from what Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def save_model(folder: str) -> float:
    """A random Qwen3; its weights in billions."""
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2304, num_hidden_layers=10, num_attention_heads=12,
        num_key_value_heads=6, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return sum(each.numel() for each in model.parameters()) / 1e9


def run(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def answer(process: subprocess.Popen[str]) -> dict[str, float]:
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"a process ended with {process.returncode}: {err}")
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def both(what: str, name: str, folder: str, meeting: str) -> dict[str, float]:
    """The larger figures of the two processes."""
    ranks = [run(what, name, folder, str(rank), f"{folder}/{meeting}") for rank in range(2)]
    found = [answer(process) for process in ranks]
    return {key: max(each[key] for each in found) for key in found[0]}


def main() -> None:
    heads = ("planned", "tracked", "ratio", "allocated", "ratio", "RSS grew")
    with tempfile.TemporaryDirectory() as folder:
        billions = save_model(folder)
        print(
            f"Qwen3 of {1000 * billions:.0f} million weights, micro-batches of {BUDGET} tokens, 2 ranks; GiB of a rank"
        )
        print(f"{'':34}" + "".join(f"{head:>11}" for head in heads), flush=True)
        for number, name in enumerate(CASES):
            plan = answer(run("predicted", name, folder))["peak"]
            found = both("measured", name, folder, f"a{number}") | both("allocated", name, folder, f"b{number}")
            compared = [each for key in ("tracked", "allocated") for each in (found[key], plan / found[key])]
            print(f"{name:34}" + "".join(f"{value:11.3f}" for value in (plan, *compared, found["rss"])), flush=True)
    if IS_SLOW:
        print("products of bfloat16 are zeros, since this CPU has no AVX-512")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    match sys.argv[1:]:
        case ["predicted", name, folder]:
            print(json.dumps(predicted(name, folder)))
        case ["measured" | "allocated" as what, name, folder, rank, meeting]:
            join(int(rank), meeting)
            print(json.dumps(measured(name, folder) if what == "measured" else allocated(name, folder)))
        case _:
            main()
