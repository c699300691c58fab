"""Two processes run this file: with one engine each, then with one engine over both. The tests read what they saw."""

from __future__ import annotations

import csv
import importlib.util
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from lit_stepwise.engines.vllm import VLLMEngine
from lit_stepwise.errors import ConfigError, EngineError
from lit_stepwise.testing import exact_logprobs, save_tiny_model
from lit_stepwise.types import Completion, Request, Sampling

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
MAX_CONTEXT = 64
PROMPTS = [[11, 12, 13], [40] * 35, [7, 99, 7, 99, 3]]
SHARED = Path("/dev/shm/-tp:0-[0-1]-cpushm_0")  # what vLLM calls the memory that two ranks on a CPU share


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]) -> list[dict[str, Any]]:
    folder = save_tiny_model(tmp_path_factory.mktemp("ranks"))
    SHARED.write_bytes(b"left behind by a run that was killed")
    run_ranks(__file__, folder, codes=(3, 0))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_ranks_that_do_not_make_whole_engines_are_refused(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert "rollout.engine.tensor_parallel_size=3 does not divide 2 ranks" in rank["three of two"]
        assert rank["three of two"].endswith("these do: 1, 2")


def test_each_rank_plays_on_an_engine_of_its_own_with_weights_from_a_sharded_module(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["gap of one"] < 1e-4
    assert seen[0]["played by one"] != seen[1]["played by one"]  # the seed is the rank's


def test_two_ranks_are_one_engine_with_weights_from_a_sharded_module(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["gap of two"] < 1e-4
    assert len(seen[0]["played by two"]) == 3
    assert seen[0]["description"].endswith("in process on CPU, float32, 2 ranks an engine")


def test_a_phase_of_two_ranks_follows_its_seed_alone_and_nothing_of_the_one_before(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["played again"] == seen[0]["played by two"]
    assert seen[0]["played after an error"] == seen[0]["played by two"]
    assert seen[0]["played with an abort"] == ["0", "2"]


def test_memory_that_ranks_share_is_neither_left_behind_nor_taken_from_another_run(
    seen: list[dict[str, Any]],
) -> None:
    for rank in seen:
        assert "-cpushm_0 belongs to a run that is starting (process " in rank["shared with another run"]
        assert rank["shared files"] == []
    assert not SHARED.exists()


def test_an_error_of_the_leader_lets_its_follower_go(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["error of the leader"] == "the environment broke"
    assert seen[1]["error of the leader"] == ""


def test_an_error_of_all_ranks_is_seen_on_all(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["error of all"].startswith("vLLM failed: VLLMValidationError: ")


def test_an_error_of_the_follower_reaches_the_leader(seen: list[dict[str, Any]]) -> None:
    assert seen[1]["error of the follower"] == "vLLM failed: MemoryError: none left"
    reason = "the engine failed on another of its ranks; rank 1: vLLM failed: MemoryError: none left"
    assert seen[0]["error of the follower"] == reason


def test_weights_are_not_taken_while_another_rank_follows(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["weights in a phase"] == (
        "load_weights was called in a phase that other ranks follow; call end_phase before"
    )


def test_only_the_leader_is_asked(seen: list[dict[str, Any]]) -> None:
    assert seen[1]["submit on a follower"] == "submit was called on a rank that follows rank 0; call follow"


def test_a_follower_notices_that_its_leader_is_gone(seen: list[dict[str, Any]]) -> None:
    assert seen[1]["death of the leader"].startswith("another rank of this engine (from rank 0 on) is gone: ")


def full_tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter.full_tensor()) for name, parameter in module.named_parameters())


def take(engine: VLLMEngine) -> list[Completion]:
    for i, prompt in enumerate(PROMPTS):
        engine.submit(Request(str(i), prompt, 9, Sampling(), 0))
    done: list[Completion] = []
    while engine.num_pending:
        done += engine.step()
    return sorted(done, key=lambda each: each.request_id)


def largest_gap(model: Any, done: list[Completion]) -> float:
    gaps = []
    for each in done:
        table = exact_logprobs(model, PROMPTS[int(each.request_id)], each.response_ids)
        taken = table.gather(1, torch.tensor(each.response_ids)[:, None])[:, 0]
        gaps.append(float((taken - torch.tensor(each.logprobs)).abs().max()))
    return max(gaps)


class Rank:
    """One of the processes: plays phases and notes what came of them."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder = rank, folder
        self.noted: dict[str, Any] = {}
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.sharded = AutoModelForCausalLM.from_pretrained(folder)
        for layer in self.sharded.model.layers:
            fully_shard(layer)
        fully_shard(self.sharded)
        self.update()

    def update(self) -> None:
        """The same noise for the sharded module and for the one that says what is expected."""
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            for ours, parameter in zip(self.sharded.parameters(), self.model.parameters(), strict=True):
                ours.copy_(dist.tensor.distribute_tensor(parameter, ours.device_mesh, ours.placements))

    def engine(self, size: int) -> VLLMEngine:
        return VLLMEngine(kv_cache_memory_mb=16, tensor_parallel_size=size)

    def phase(self, engine: VLLMEngine, seed: int, play: Callable[[VLLMEngine], Any] = take) -> Any:
        engine.begin_phase(seed)
        try:
            return play(engine) if engine._ranks.leads else engine.follow()
        finally:
            engine.end_phase()

    def failure(self, call: Callable[[], Any]) -> str:
        try:
            call()
        except (EngineError, ConfigError, ValueError) as error:
            return str(error)
        return ""

    def one_each(self) -> None:
        self.noted["three of two"] = self.failure(lambda: self.engine(3).start(str(self.folder), MAX_CONTEXT))
        engine = self.engine(1)
        engine.start(str(self.folder), MAX_CONTEXT)
        engine.load_weights(full_tensors(self.sharded), 1)
        done = self.phase(engine, seed=self.rank)
        self.noted["gap of one"] = largest_gap(self.model, done)
        self.noted["played by one"] = str(done)
        engine.close()

    def one_for_both(self) -> VLLMEngine:
        with SHARED.open("r+b") if self.rank == 0 else open(os.devnull) as file:
            held = mmap.mmap(file.fileno(), 1) if self.rank == 0 else None
            engine = self.engine(2)
            self.noted["shared with another run"] = self.failure(lambda: engine.start(str(self.folder), MAX_CONTEXT))
            if held is not None:
                held.close()
        engine.start(str(self.folder), MAX_CONTEXT)
        self.noted["description"] = engine.description
        self.update()
        engine.load_weights(full_tensors(self.sharded), 2)
        done = self.phase(engine, seed=5)
        self.noted["shared files"] = [path.name for path in Path("/dev/shm").glob("*cpushm*")]
        if self.rank == 0:
            self.noted["gap of two"] = largest_gap(self.model, done)
            self.noted["played by two"] = [str(each) for each in done]
        return engine

    def errors(self, engine: VLLMEngine) -> None:
        self.noted["played again"] = [str(each) for each in self.phase(engine, seed=5) or ()]
        self.noted["played with an abort"] = self.phase(engine, 7, self.play_with_an_abort)
        if self.rank == 1:
            self.noted["submit on a follower"] = self.failure(lambda: take(engine))
        self.noted["error of the leader"] = self.failure(lambda: self.phase(engine, 7, self.break_off))
        self.noted["weights in a phase"] = self.failure(lambda: self.phase(engine, 7, self.load_in_between))
        self.noted["error of all"] = self.failure(lambda: self.phase(engine, 7, self.ask_the_impossible))
        self.noted["played after an error"] = [str(each) for each in self.phase(engine, seed=5) or ()]
        if self.rank == 1:
            engine._core.engine.step = failing_after(engine._core.engine.step)
        self.noted["error of the follower"] = self.failure(lambda: self.phase(engine, 7))
        engine.close()

    def death(self, engine: VLLMEngine) -> None:
        engine.start(str(self.folder), MAX_CONTEXT)
        engine.load_weights(full_tensors(self.sharded), 3)
        self.noted["death of the leader"] = self.failure(lambda: self.phase(engine, 7, self.die))
        self.save()
        engine.close()

    def play_with_an_abort(self, engine: VLLMEngine) -> list[str]:
        for i, prompt in enumerate(PROMPTS):
            engine.submit(Request(str(i), prompt, 9, Sampling(), 0))
        engine.step()
        engine.abort(["1"])
        done = []
        while engine.num_pending:
            done += [each.request_id for each in engine.step()]
        return sorted(done)

    def break_off(self, engine: VLLMEngine) -> None:
        engine.submit(Request("0", PROMPTS[0], 30, Sampling(), 0))
        engine.step()
        raise ValueError("the environment broke")

    def load_in_between(self, engine: VLLMEngine) -> None:
        engine.load_weights(self.model.named_parameters(), 9)

    def ask_the_impossible(self, engine: VLLMEngine) -> None:
        engine.submit(Request("0", [40_000], 3, Sampling(), 0))
        engine.step()

    def die(self, engine: VLLMEngine) -> None:
        engine.submit(Request("0", PROMPTS[0], 30, Sampling(), 0))
        engine.step()
        self.save()
        os._exit(3)

    def save(self) -> None:
        (self.folder / f"{self.rank}.json").write_text(json.dumps(self.noted))


def failing_after(step: Callable[[], Any]) -> Callable[[], Any]:
    def fail() -> None:
        step()  # the other rank waits for what this one computes
        raise MemoryError("none left")

    return fail


def main(rank: int, folder: Path) -> None:
    this = Rank(rank, folder)
    engine = this.one_for_both()
    this.errors(engine)
    this.one_each()
    this.death(engine)


def column(folder: Path, name: str) -> list[float]:
    (path,) = folder.glob("runs/*/metrics.csv")
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_two_ranks_train_and_share_one_engine(countdown: dict[str, Any], run: Any, tmp_path: Path) -> None:
    countdown["rollout"]["engine"] = {
        "class_path": "lit_stepwise.engines.VLLMEngine",
        "init_args": {"tensor_parallel_size": 2},
    }
    countdown["rollout"]["max_logprob_gap"] = 1e-4
    countdown["trainer"] |= {"devices": 2, "strategy": "ddp", "max_epochs": 2}
    done = run("fit", countdown)
    assert done.returncode == 0, done.stderr
    gaps = column(tmp_path, "train/logprob_gap")
    assert len(gaps) == 4
    assert max(gaps[::2]) < 1e-5  # of the first step of each iteration; the second has moved


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
