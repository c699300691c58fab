"""What ``kill_training.py`` puts into the runs that it kills: they say what they are doing, and what they trained."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lit_stepwise.engines import TransformersEngine

PHASES, TRAINED = Path("phases.txt"), Path("trained.jsonl")


def announce(phase: str) -> None:
    """From now on, and until the next line, it is busy with that."""
    with PHASES.open("a") as file:
        file.write(f"{time.monotonic()} {phase}\n")


class WatchedEngine(TransformersEngine):
    """Says when it is given weights."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """As it does, and slowly enough to be killed meanwhile."""
        announce("weight sync")
        super().load_weights(_slowly(weights), policy_version)


def _slowly(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for each in weights:
        time.sleep(0.002)
        yield each


class Watched(pl.Callback):
    """Announces phases on rank 0, and after each optimizer step notes what it was made of and the weights it made."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """All ranks compute, one writes."""
        self._writes = trainer.is_global_zero

    def on_rollout_start(self, stage: str, iteration: int, num_trajectories: int) -> None:
        """Play of either kind."""
        self._announce("evaluation" if stage == "evaluate" else "play")

    def on_rollout_end(self, rollout: Any) -> None:
        """Advantages and bookkeeping."""
        self._announce("between")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """An optimizer step."""
        self._announce("training")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note it, before the checkpoint is written."""
        self._announce("between")
        digest = hashlib.sha256()
        for name, tensor in pl_module.weights():
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        tasks = trainer.datamodule.tasks_for(batch.iteration)  # type: ignore[attr-defined]
        samples = sorted((each.group, each.sample, each.turn, list(each.prompt_ids), list(each.response_ids),
                          list(each.advantages)) for each in batch.samples)  # fmt: skip
        note = {
            "step": trainer.global_step,
            "iteration": batch.iteration,
            "tasks": sorted({tasks[each.group].task_id for each in batch.samples}),
            "samples": hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
            "weights": digest.hexdigest(),
        }
        if self._writes:
            with TRAINED.open("a") as file:
                file.write(json.dumps(note) + "\n")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """What it is to hold is collected; next it is written."""
        self._announce("saving")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Metrics are logged."""
        self._announce("between")

    def _announce(self, phase: str) -> None:
        if self._writes:
            announce(phase)
