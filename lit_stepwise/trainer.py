"""Lightning's Trainer with what a run of this kind needs besides."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lit_stepwise.errors import ConfigError
from lit_stepwise.rollout.callback import RolloutCallback
from lit_stepwise.training.datamodule import TaskDataModule
from lit_stepwise.training.module import StepwiseModule


class StepwiseTrainer(pl.Trainer):
    """Can play without training, too."""

    def play(
        self,
        model: StepwiseModule,
        datamodule: TaskDataModule,
        split: Literal["train", "val", "test"] = "val",
        samples_per_task: int = 1,
        max_tasks: int | None = None,
        output: str = "runs/play",
        ckpt_path: str | None = None,
    ) -> None:
        """Play tasks and write the trajectories, with Fabric alone: no optimizer, no loop, no logger.

        Args:
            model: gives the weights.
            datamodule: gives the tasks.
            split: which files.
            samples_per_task: 1 plays as ``rollout.evaluation`` says, more with ``rollout.sampling``.
            max_tasks: the first so many only.
            output: a folder; files of an earlier play are never written over.
            ckpt_path: weights of a Lightning checkpoint instead of ``model.model_path``.
        """
        rollout = next((each for each in self.callbacks if isinstance(each, RolloutCallback)), None)  # type: ignore[attr-defined]
        if rollout is None:
            raise ConfigError("play needs a RolloutCallback; give the section rollout")
        bars = [each for each in self.callbacks if each is not rollout]  # type: ignore[attr-defined]
        fabric = Fabric(accelerator=self.strategy.root_device.type, devices=self.num_devices, callbacks=bars)
        fabric.launch()
        for bar in (each for each in bars if isinstance(each, ProgressBar) and not fabric.is_global_zero):
            bar.disable()
        with fabric.rank_zero_first(local=True):
            datamodule.prepare_data()
        tasks = datamodule.read(split)[:max_tasks]
        folder = _unused(Path(output))
        model.configure_model()
        if ckpt_path is not None:
            checkpoint = torch.load(ckpt_path, weights_only=True, map_location="cpu")
            model.on_load_checkpoint(checkpoint)
            model.load_state_dict(checkpoint["state_dict"])
        playable = rollout.attach(fabric, model, tasks, folder)
        try:
            trajectories = rollout.play(playable, samples_per_task)
        finally:
            rollout.close()
        accuracy = sum(each.success for each in trajectories) / len(trajectories)
        reward = sum(each.reward for each in trajectories) / len(trajectories)
        rank_zero_info(
            f"played {len(trajectories)} trajectories of {len(playable)} tasks: accuracy {accuracy:.1%}, "
            f"reward {reward:.3f}; files in {folder}"
        )


def find_checkpoint(ckpt_path: str | Path | None, folder: str) -> str | Path | None:
    """``last`` becomes the newest ``last.ckpt`` of any run below ``folder``, or None when there is none.

    Raises ``ConfigError`` for a path that does not exist.
    """
    if ckpt_path == "last":
        found = sorted(Path(folder).glob("**/last.ckpt"), key=lambda path: path.stat().st_mtime)
        said = f"resuming from {found[-1]}" if found else f"no last.ckpt below {folder}, so this is a fresh start"
        rank_zero_info(f"ckpt_path=last: {said}")
        return found[-1] if found else None
    if ckpt_path is not None and not Path(ckpt_path).exists():
        raise ConfigError(f"ckpt_path={str(ckpt_path)!r} does not exist; give a checkpoint, or 'last'")
    return ckpt_path


def _unused(folder: Path) -> Path:
    """``folder``, or the first of ``folder-2``, ``folder-3``, … that does not exist."""
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
