"""How much of vLLM's speed the agent loop keeps, and what it gains where the environment is slow.

    OMP_NUM_THREADS=1 python benchmarks/rollout.py [--rounds 5] [--trajectories 64] [--turns 4] [--tokens 48]

One process, one random Qwen3 of 7 million weights, every response of exactly ``--tokens`` tokens. In each round, one
after the other:

    loop       the AgentLoop on VLLMEngine, with an environment that answers at once
    generate   vllm.LLM.generate on the very prompts and response lengths of that, a call for all first turns, one for
               all second turns, and so on; the same vLLM settings, prefix caches empty at the start
    slow       the AgentLoop, with an environment that takes --latency seconds in the mean
    barrier    a loop that waits for all environments before anybody speaks again; the same engine and latencies

The latter two with latencies that are uniform from 0 to twice the mean, and with exponential ones, whose few long waits
are more like those of a shared database.

Ready: seconds from the start of a fresh process to an engine that takes requests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from lit_stepwise.engines import VLLMEngine
from lit_stepwise.engines.vllm_settings import sampling_params
from lit_stepwise.interfaces import Environment, Episode
from lit_stepwise.rollout.agent_loop import AgentLoop, Attempt
from lit_stepwise.rollout.rendering import ChatRenderer
from lit_stepwise.testing import save_tiny_model
from lit_stepwise.types import Deadlines, Feedback, Limits, Message, Request, Sampling, Task, Turn

WAYS = (
    "loop", "generate", "slow, uniform", "barrier, uniform", "slow, exponential", "barrier, exponential",
)  # fmt: skip
READY = """
import time
from lit_stepwise.engines import VLLMEngine
VLLMEngine().start({path!r}, {context})
print(time.time())
"""


@dataclass
class Waiting(Environment):
    """Says the same every time, after a time that is a function of attempt and turn."""

    latency: float
    turns: int
    kind: str = "uniform"

    def start(self, task: Task, max_turns: int) -> Episode:
        """Begin."""
        return WaitingEpisode(self, int(task.task_id))


@dataclass
class WaitingEpisode(Episode):
    """One attempt."""

    settings: Waiting
    number: int
    turn: int = 0

    def prompt(self) -> Sequence[Message]:
        """About 150 tokens, of which the first half is shared."""
        return [Message("user", "count the rows of " * 5 + f"table {self.number:03d} " * 6)]

    def step(self, response: str) -> Feedback:
        """Take that long."""
        self.turn += 1
        if self.settings.latency:
            rng = np.random.default_rng([self.number, self.turn])
            shares = {"uniform": 2 * rng.random(), "exponential": rng.exponential()}
            time.sleep(self.settings.latency * float(shares[self.settings.kind]))
        return Feedback("what next? " * 3, done=self.turn == self.settings.turns)


@dataclass
class Bench:
    """What all ways of playing share."""

    engine: VLLMEngine
    renderer: ChatRenderer
    arguments: argparse.Namespace
    turns: list[Turn] = field(default_factory=list)

    @property
    def sampling(self) -> Sampling:
        """The same for all ways."""
        return Sampling(stop=("</sql>",) if self.arguments.stop else ())

    @property
    def num_tokens(self) -> int:
        """Of one round."""
        return self.arguments.trajectories * self.arguments.turns * self.arguments.tokens

    def limits(self) -> Limits:
        """Every response ends by its length."""
        return Limits(512, self.arguments.context, self.arguments.tokens, self.arguments.turns)

    def attempts(self) -> list[Attempt]:
        """One a task."""
        return [Attempt(Task(task_id=str(n)), n, 0, (0,), self.sampling) for n in range(self.arguments.trajectories)]

    def loop(self, latency: float, kind: str = "uniform") -> float:
        """Seconds; keeps the turns."""
        self.turns.clear()
        self.engine.begin_phase(1)
        play = AgentLoop(
            self.engine, Waiting(latency, self.arguments.turns, kind), self.renderer, self.limits(), False,
            self.arguments.threads, Deadlines(), on_turn_end=lambda turn, task_id: self.turns.append(turn),
        )  # fmt: skip
        attempts = self.attempts()
        began = time.perf_counter()
        play.play(attempts)
        seconds = time.perf_counter() - began
        self.engine.end_phase()
        assert sum(len(turn.response_ids) for turn in self.turns) == self.num_tokens
        return seconds

    def barrier(self, latency: float, kind: str) -> float:
        """Seconds of a loop in which everybody waits for everybody after each turn."""
        self.engine.begin_phase(1)
        environment, attempts = Waiting(latency, self.arguments.turns, kind), self.attempts()
        began = time.perf_counter()
        episodes = [environment.start(each.task, self.arguments.turns) for each in attempts]
        prompts = [self.renderer.first_prompt(each.prompt()) for each in episodes]
        played: list[list[Turn]] = [[] for _ in attempts]
        with ThreadPoolExecutor(self.arguments.threads) as pool:
            for turn in range(self.arguments.turns):
                for number, prompt in enumerate(prompts):
                    request = Request(str(number), prompt, self.arguments.tokens, self.sampling, seed=0)
                    self.engine.submit(request)
                answers: dict[str, Any] = {}
                while self.engine.num_pending:
                    answers |= {each.request_id: each for each in self.engine.step()}
                ordered = [answers[str(number)] for number in range(len(attempts))]
                texts = [self.renderer.text(each.response_ids) for each in ordered]
                feedback = list(pool.map(lambda pair: pair[0].step(pair[1]), zip(episodes, texts, strict=True)))
                for number, (answer, said) in enumerate(zip(ordered, feedback, strict=True)):
                    ids = answer.response_ids
                    played[number].append(Turn(prompts[number], ids, answer.logprobs, answer.versions, "", said))
                    if turn + 1 < self.arguments.turns:
                        prompts[number] = self.renderer.next_prompt(episodes[number].prompt(), played[number])
        seconds = time.perf_counter() - began
        self.engine.end_phase()
        return seconds

    def generate(self, llm: Any) -> float:
        """Seconds of vLLM on its own, on the turns of the last ``loop``."""
        by_length: dict[int, list[Turn]] = {}
        counts: dict[tuple[int, ...], int] = {}
        for turn in self.turns:  # in the order of time, so a trajectory's turns come in order
            first = tuple(turn.prompt_ids[:150])
            counts[first] = counts.get(first, 0) + 1
            by_length.setdefault(counts[first], []).append(turn)
        request = Request("any", [1], self.arguments.tokens, self.sampling, seed=0)
        settings = sampling_params(request, self.arguments.context)
        llm.reset_prefix_cache()
        seconds, num_tokens = 0.0, 0
        for number in sorted(by_length):
            prompts = [{"prompt_token_ids": list(turn.prompt_ids)} for turn in by_length[number]]
            began = time.perf_counter()
            outputs = llm.generate(prompts, settings, use_tqdm=False)
            seconds += time.perf_counter() - began
            num_tokens += sum(len(each.outputs[0].token_ids) for each in outputs)
        assert num_tokens == self.num_tokens
        return seconds


def ready_seconds(path: Path, context: int) -> float:
    """From the start of a process to a live engine."""
    began = time.time()
    program = READY.format(path=str(path), context=context)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) - began


def build(path: Path, arguments: argparse.Namespace) -> tuple[Bench, Any]:
    """Our engine and vLLM's own, with the same settings and weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    engine = VLLMEngine(engine_kwargs={"max_num_seqs": arguments.trajectories})
    engine.start(str(path), arguments.context)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine.load_weights(((name, weight.detach()) for name, weight in model.named_parameters()), 0)
    renderer = ChatRenderer.of(AutoTokenizer.from_pretrained(path))
    from vllm import LLM

    llm = LLM(
        model=str(path), dtype="float32", max_model_len=arguments.context, enforce_eager=True, block_size=32,
        kv_cache_memory_bytes=256 << 20, logprobs_mode="processed_logprobs", max_num_seqs=arguments.trajectories,
    )  # fmt: skip
    return Bench(engine, renderer, arguments), llm


def silent_eos(path: Path) -> None:
    """Let no response end before its length: the end-of-turn token is one that the model does not have."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    model.save_pretrained(path)
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    tokenizer.save_pretrained(path)


def main() -> None:
    """Print every way, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "rounds": 5, "trajectories": 64, "turns": 4, "tokens": 48, "context": 1024, "threads": 64, "ready": 3,
        "hidden": 256, "layers": 8,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--stop", action="store_true", help="look for a stop string, as text-to-SQL does")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny_model(folder, hidden_size=arguments.hidden, num_layers=arguments.layers)
        silent_eos(path)
        print(f"{vars(arguments)}\n{os.cpu_count()} CPUs, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'unset')}")
        waits = [ready_seconds(path, arguments.context) for _ in range(arguments.ready)]
        print("ready       " + "  ".join(f"{wait:.1f}" for wait in waits) + " s after the start of the process")
        bench, llm = build(path, arguments)
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        with torch.compiler.set_stance("force_eager"):
            for index in range(arguments.rounds + 1):
                took = {"loop": bench.loop(0.0)}
                took["generate"] = bench.generate(llm)
                for kind in ("uniform", "exponential"):
                    took[f"slow, {kind}"] = bench.loop(arguments.latency, kind)
                    took[f"barrier, {kind}"] = bench.barrier(arguments.latency, kind)
                if index:  # the first warms up
                    for name, value in took.items():
                        seconds[name].append(value)
        for name, values in seconds.items():
            rates = [bench.num_tokens / value for value in values]
            spread = f"({min(rates):.0f}-{max(rates):.0f})"
            print(f"{name:20} {median(values):6.2f} s  {median(rates):6.0f} tokens/s  {spread}")
        for ours, other in zip(WAYS[::2], WAYS[1::2], strict=True):
            ratios = [b / a for a, b in zip(seconds[ours], seconds[other], strict=True)]
            spread = f"({min(ratios):.2f}-{max(ratios):.2f})"
            print(f"({ours}) / ({other}): tokens/s of the same round, median {median(ratios):.2f} {spread}")
        bench.engine.close()


if __name__ == "__main__":
    main()
