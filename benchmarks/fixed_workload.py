"""The loop on a fixed amount of work, phase by phase: for a harness that runs several trainers turn about.

    BENCH_WL=<workload> BENCH_OUT=rows.json OMP_NUM_THREADS=1 python benchmarks/fixed_workload.py [--dtype bfloat16]

What runs is the real thing: Trainer, StepwiseModule, RolloutCallback and VLLMEngine in this process, one optimizer step
an iteration, weights synced before each play, AdamW, DualClip and GroupRelative. Timers are all that is added.

The harness sets ``OMP_NUM_THREADS`` and

    BENCH_WL      folder with the workload, see below
    BENCH_OUT     JSON file to write
    BENCH_THREADS, BENCH_WARM, BENCH_STEPS, BENCH_SEED    threads of torch (1), optimizer steps before those measured
                  (1), optimizer steps measured (2), seed (0)

A workload is a folder with

    workload.json       prompts_per_step, group_size, turns, prompt_tokens, gen_tokens_per_turn, trajectory_tokens, lr
    prompts.json        [{id, prompt_ids}]: what ChatML makes of a system's and a user's message
    observations.json   [{sql, content, suffix_ids}]: statement to run, what the model is told, and the ids that stand
                        between two responses then
    shop.sqlite, model/ a database and a Hugging Face model of ChatML

Each response has exactly gen_tokens_per_turn tokens, since the copy of the model that is trained knows no token that
ends a turn. Turn t of prompt i is answered with observation i + t, for the whole batch to be the same for everybody.

Written are rows {system, phase, seconds, cpu_seconds, tokens}, means over the measured steps: ``seconds`` of the clock,
``cpu_seconds`` of all threads of the process. Phases are

    rollout_generate    inside the engine
    rollout_other       the rest of play: rendering, environment, store, credit, rows
    logprob             a forward pass for old logprobs; 0, since one step an iteration needs none
    train, optimizer    forward and backward passes; AdamW
    weight_sync         weights into the engine, and the probe that compares engine and trainer
    other               whatever else Lightning does between the end of a step and the end of the next
    step                all of them

and the row of ``step`` says what was done, as it was counted: ``work``. A run whose engine read a prompt other than the
workload's fails. Read ``cpu_seconds`` at one thread, as a ratio to another system of the same round: the clock of a
shared machine says little.

``--history strip`` is for comparing the phase ``train`` of one ``--packing`` with that of another: each response closes
a thought, its last 16 tokens are all that later prompts show of it, and no prompt continues the one before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sqlite3
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger

import lit_stepwise.rollout.phases as phases_of_play
from lit_stepwise.algo import DualClip, GroupRelative
from lit_stepwise.engines import VLLMEngine
from lit_stepwise.interfaces import Environment, Episode, TaskSource
from lit_stepwise.rollout import RolloutCallback
from lit_stepwise.training import StepwiseModule, TaskDataModule
from lit_stepwise.types import Completion, Feedback, Limits, Message, Rollout, Task

PHASES = ("rollout_generate", "rollout_other", "logprob", "train", "optimizer", "weight_sync", "other")
KEPT = 16
"""Tokens of a response that later prompts show where thoughts are stripped."""
TEMPLATE = r"""
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
{{ "<|im_start|>assistant\n" + message.content }}
{%- elif loop.index0 and messages[loop.index0 - 1].role == "assistant" -%}
{{ "\n<|im_start|>user\n<tool_response>\n" + message.content + "\n</tool_response><|im_end|>\n" }}
{%- else -%}
{{ "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}
{%- endif -%}
{%- endfor -%}
{{ "<|im_start|>assistant\n" }}"""
"""ChatML, with what is said after a response as the answer of a tool, and nothing that ends a response."""


# ---- the workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Question(Task):
    """One prompt of the workload."""

    number: int
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    """What the workload says that ``messages`` come to."""


@dataclass
class Questions(TaskSource):
    """The prompts of a workload, in order."""

    tokenizer: Any

    def read(self, file: str) -> list[Task]:
        """All of ``prompts.json``."""
        return [self._question(row["id"], row["prompt_ids"]) for row in json.loads(Path(file).read_text())]

    def _question(self, number: int, prompt_ids: Sequence[int]) -> Question:
        pieces = self.tokenizer.decode(prompt_ids).split("<|im_start|>")[1:-1]
        said = [piece.removesuffix("<|im_end|>\n").split("\n", 1) for piece in pieces]
        messages = tuple(Message(role, content) for role, content in said)
        return Question(task_id=str(number), number=number, messages=messages, prompt_ids=tuple(prompt_ids))


class Probes(Environment):
    """Runs a statement of its own, whatever the model says, and tells what the workload says about it."""

    def __init__(self, workload: Path, seed: int) -> None:
        self.database = workload / "shop.sqlite"
        self.observations = json.loads((workload / "observations.json").read_text())
        self.random = random.Random(seed)

    def start(self, task: Task, max_turns: int) -> Episode:
        """Begin."""
        assert isinstance(task, Question)
        return _Probing(self, task, max_turns)


@dataclass
class _Probing(Episode):
    settings: Probes
    question: Question
    max_turns: int
    turn: int = 0

    def prompt(self) -> Sequence[Message]:
        return self.question.messages

    def step(self, response: str) -> Feedback:
        self.turn += 1
        if self.turn == self.max_turns:
            return Feedback("", rewards={"luck": self.settings.random.random()}, done=True)
        known = self.settings.observations
        observation = known[(self.question.number + self.turn - 1) % len(known)]
        with closing(sqlite3.connect(self.settings.database)) as connection:
            connection.execute(observation["sql"]).fetchall()
        return Feedback(observation["content"])


def copy_model(source: Path, target: Path) -> None:
    """The same weights and tokens; no token ends a turn, and the chat template is ours."""
    shutil.copytree(source, target)
    ends = {"config": "eos_token_id", "generation_config": "eos_token_id", "tokenizer_config": "eos_token"}
    for name, key in ends.items():
        path = target / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: None}))
    (target / "chat_template.jinja").write_text(TEMPLATE)


class FixedEngine(VLLMEngine):
    """Ends no response with what a turn is closed with, and closes a thought in each where thoughts are stripped.

    A random model would do the one now and then and the other never, and prompts would differ in length. The few tokens
    that are not what was sampled keep the logprobs of those that were.
    """

    def fix(self, tokenizer: Any, num_tokens: int, strip: bool) -> None:
        """Know what responses of ``num_tokens`` are to look like."""
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        (self._close,) = tokenizer("</think>", add_special_tokens=False)["input_ids"]
        self._barred = {token for token, text in enumerate(texts) if text.startswith("\n")} | {self._close}
        self._plain = next(token for token, text in enumerate(texts) if text.isalpha())
        self._num_tokens, self._num_kept, self._strip = num_tokens, KEPT if strip else 1, strip

    def step(self) -> list[Completion]:
        """Those that finished, fixed."""
        return [self._fixed(each) for each in super().step()]

    def _fixed(self, completion: Completion) -> Completion:
        ids = completion.response_ids
        if len(ids) != self._num_tokens:  # of a probe, which is compared to the letter
            return completion
        thought, kept = [*ids[: -self._num_kept]], ids[-self._num_kept :]
        if self._strip:
            thought[-1] = self._close
        return replace(
            completion, response_ids=[*thought, *(self._plain if token in self._barred else token for token in kept)]
        )


# ---- the clock


@dataclass
class Clock:
    """Seconds of the wall and of the process, each in one phase at a time; what a weight sync calls is weight sync."""

    phase: str = "other"
    spent: dict[str, Any] = field(default_factory=lambda: defaultdict(lambda: np.zeros(2)))
    since: Any = field(default_factory=lambda: Clock.now())

    @staticmethod
    def now() -> Any:
        """Both clocks."""
        return np.array([time.perf_counter(), time.process_time()])

    def switch(self, phase: str) -> str:
        """Count for ``phase`` from now on; the one before."""
        now = self.now()
        self.spent[self.phase] += now - self.since
        before, self.phase, self.since = self.phase, phase, now
        return before

    @contextmanager
    def count(self, phase: str) -> Iterator[None]:
        """For ``phase`` inside."""
        before = self.switch("weight_sync" if self.phase == "weight_sync" else phase)
        try:
            yield
        finally:
            self.switch(before)

    def time(self, owner: Any, method: str, phase: str) -> None:
        """Count what this method takes for ``phase``."""
        call = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.count(phase):
                return call(*arguments, **named)

        setattr(owner, method, timed)

    def read(self) -> dict[str, Any]:
        """What was spent on each phase since the last time."""
        self.switch(self.phase)
        spent = {phase: self.spent[phase] for phase in PHASES}
        self.spent.clear()
        return spent


@dataclass
class Recorder(pl.Callback):
    """Reads the clock when a step is done, and keeps what was done in it. The last of the callbacks."""

    clock: Clock
    spent: list[dict[str, Any]] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    counts: list[dict[str, int]] = field(default_factory=list)

    def on_rollout_end(self, rollout: Rollout) -> None:
        """Keep it."""
        self.rollouts.append(rollout)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time AdamW alone, without what Lightning does around it."""

        def count(phase: str) -> Callable[..., None]:
            def hook(*_: object) -> None:
                self.clock.switch(phase)

            return hook

        (optimizer,) = trainer.optimizers
        optimizer.register_step_pre_hook(count("optimizer"))
        optimizer.register_step_post_hook(count("train"))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """An iteration is one optimizer step."""
        counted = trainer.callback_metrics
        self.counts.append({kind: int(counted[f"tokens/{kind}"]) for kind in ("trained", "forwarded")})
        self.spent.append(self.clock.read())


# ---- the run


def train(arguments: argparse.Namespace, workload: Path, folder: Path) -> list[dict[str, Any]]:
    """Run the loop, and say what the measured steps took and did."""
    from transformers import AutoTokenizer

    spec = json.loads((workload / "workload.json").read_text())
    settings = {"THREADS": 1, "WARM": 1, "STEPS": 2, "SEED": 0}
    threads, warm, steps, seed = (int(os.environ.get(f"BENCH_{name}", value)) for name, value in settings.items())
    torch.set_num_threads(threads)
    pl.seed_everything(seed, verbose=False)
    copy_model(workload / "model", folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    questions = Questions(tokenizer)
    environment = Probes(workload, seed)
    rollout = player(arguments, spec, tokenizer, environment, seed)
    module = learner(arguments, spec, folder / "model")
    recorder = Recorder(timers(rollout, module))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed" if arguments.dtype == "bfloat16" else "32-true",
        max_epochs=warm + steps,
        callbacks=[rollout, recorder],
        logger=CSVLogger(folder, name="", version="run"),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    file = str(workload / "prompts.json")
    trainer.fit(
        module, datamodule=TaskDataModule(questions, file, tasks_per_iteration=spec["prompts_per_step"], seed=seed)
    )
    num_kept = KEPT if arguments.history == "strip" else spec["gen_tokens_per_turn"]
    check_prompts(recorder.rollouts, questions.read(file), environment.observations, num_kept)
    system = f"lit-stepwise/{arguments.dtype}/{arguments.rows}/{arguments.packing}/{arguments.history}/t{threads}"
    return rows(system, recorder, warm)


def player(
    arguments: argparse.Namespace, spec: dict[str, Any], tokenizer: Any, environment: Environment, seed: int
) -> RolloutCallback:
    """What plays."""
    num_trajectories = spec["prompts_per_step"] * spec["group_size"]
    engine = FixedEngine(dtype=arguments.dtype, engine_kwargs={"max_num_seqs": num_trajectories})
    engine.fix(tokenizer, spec["gen_tokens_per_turn"], strip=arguments.history == "strip")
    return RolloutCallback(
        engine=engine,
        environment=environment,
        advantage=GroupRelative(),
        samples_per_task=spec["group_size"],
        samples=arguments.rows,
        limits=Limits(
            max_prompt_tokens=spec["prompt_tokens"],
            max_context_tokens=spec["trajectory_tokens"],
            max_new_tokens=spec["gen_tokens_per_turn"],
            max_turns=spec["turns"],
        ),
        history="strip_think" if arguments.history == "strip" else "append",
        deterministic=True,
        seed=seed,
    )


def learner(arguments: argparse.Namespace, spec: dict[str, Any], model: Path) -> StepwiseModule:
    """What learns."""
    return StepwiseModule(
        str(model),
        loss=DualClip(low=0.2, high=0.2, dual=3.0),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=spec["lr"], weight_decay=0.0),
        max_tokens_per_micro_batch=arguments.micro_batch_tokens,
        packing=arguments.packing,
    )


def timers(rollout: RolloutCallback, module: StepwiseModule) -> Clock:
    """A clock that knows what belongs to which phase, but for the optimizer."""
    clock = Clock()
    clock.time(rollout, "collect", "rollout_other")
    for method in ("begin_phase", "submit", "step", "end_phase"):
        clock.time(rollout.engine, method, "rollout_generate")
    clock.time(phases_of_play, "sync_weights", "weight_sync")
    clock.time(module, "with_old_logprobs", "logprob")
    clock.time(module, "training_step", "train")
    return clock


def check_prompts(
    rollouts: Sequence[Rollout], tasks: Sequence[Task], observations: Sequence[dict[str, Any]], num_kept: int
) -> None:
    """Stop where the engine read another prompt than the workload's; ``num_kept`` tokens of a response stay in it."""
    questions = {task.task_id: task for task in tasks if isinstance(task, Question)}
    for trajectory in (each for rollout in rollouts for each in rollout.trajectories):
        question = questions[trajectory.task_id]
        expected = [*question.prompt_ids]
        for index, turn in enumerate(trajectory.turns):
            if [*turn.prompt_ids] != expected:
                raise SystemExit(f"the prompt of turn {index} of task {trajectory.task_id} is not the workload's")
            said = observations[(question.number + index) % len(observations)]
            expected += [*turn.response_ids[-num_kept:], *said["suffix_ids"]]


def rows(system: str, recorder: Recorder, warm: int) -> list[dict[str, Any]]:
    """Means over the steps after the first ``warm``, and what the last one did."""
    spent, rollout, counts = recorder.spent[warm:], recorder.rollouts[-1], recorder.counts[-1]
    means = {phase: sum(each[phase] for each in spent) / len(spent) for phase in PHASES}
    means["step"] = sum(means.values())
    tokens = {
        "rollout_generate": rollout.num_generated_tokens,
        "train": counts["forwarded"],
        "step": rollout.num_generated_tokens,
    }
    found: list[dict[str, Any]] = [
        {
            "system": system,
            "phase": phase,
            "seconds": round(float(wall), 4),
            "cpu_seconds": round(float(cpu), 4),
            "tokens": tokens.get(phase, 0),
        }
        for phase, (wall, cpu) in means.items()
    ]
    by_turn = zip(*(trajectory.turns for trajectory in rollout.trajectories), strict=True)
    found[-1] |= {
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "work": {
            "trajectories": len(rollout.trajectories),
            "generated_tokens": rollout.num_generated_tokens,
            "loss_tokens": counts["trained"],
            "turn_prompt_lens": [sorted({len(turn.prompt_ids) for turn in turns}) for turns in by_turn],
        },
    }
    return found


def main() -> None:
    """Write the rows, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of engine and trainer")
    parser.add_argument("--packing", choices=["tree", "trajectory", "none"], default="tree", help="model.packing")
    parser.add_argument("--rows", choices=["step", "trajectory"], default="step", help="rollout.samples")
    parser.add_argument("--history", choices=["append", "strip"], default="append")
    parser.add_argument("--micro-batch-tokens", type=int, default=11008, help="model.max_tokens_per_micro_batch")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        found = train(arguments, Path(os.environ["BENCH_WL"]).resolve(), Path(folder))
    Path(os.environ["BENCH_OUT"]).write_text(json.dumps(found, indent=1))
    for row in found:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
