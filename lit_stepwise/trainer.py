"""Lightning's Trainer with what a run of this kind needs besides."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lit_stepwise.checkpoints.policy import read_checkpoint
from lit_stepwise.errors import ConfigError
from lit_stepwise.rollout.callback import RolloutCallback
from lit_stepwise.store.write import unused
from lit_stepwise.training.datamodule import TaskDataModule
from lit_stepwise.training.module import StepwiseModule

_LAUNCHERS: tuple[tuple[str, type[ClusterEnvironment], str], ...] = (
    ("torchrun", TorchElasticEnvironment, "WORLD_SIZE"),  # first, for it may run within a job of SLURM
    ("srun", SLURMEnvironment, "SLURM_NTASKS"),
)
"""Their number of processes is in that variable."""


class StepwiseTrainer(pl.Trainer):
    """Can play without training, too, and logs how long it takes to save a checkpoint."""

    def save_checkpoint(
        self, filepath: str | Path, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Lightning's, after the metrics of the same step are written; all ranks call it together.

        Logs ``seconds/save`` with the step whose weights are saved.
        """
        for logger in self.loggers:
            logger.save()
        began = time.perf_counter()
        super().save_checkpoint(filepath, weights_only, storage_options)
        for logger in self.loggers:
            # as with the other metrics of an optimizer step, whose number is that of steps before it
            logger.log_metrics({"seconds/save": time.perf_counter() - began}, step=max(0, self.global_step - 1))

    def play(
        self,
        model: StepwiseModule,
        datamodule: TaskDataModule,
        split: Literal["train", "val", "test"] = "val",
        samples_per_task: int = 1,
        max_tasks: int | None = None,
        output: str = "runs/play",
        ckpt_path: str | Path | None = None,
    ) -> None:
        """Play tasks and write the trajectories, with Fabric alone: no optimizer, no loop, no logger.

        Args:
            model: gives the weights.
            datamodule: gives the tasks.
            split: which files.
            samples_per_task: 1 plays as ``rollout.evaluation`` says, more with ``rollout.sampling``.
            max_tasks: the first so many only.
            output: a folder; files of an earlier play are never written over.
            ckpt_path: weights of a checkpoint of ``fit``, a file or a folder of shards, instead of those of
                ``model.model_path``.
        """
        rollout = next((each for each in self.callbacks if isinstance(each, RolloutCallback)), None)  # type: ignore[attr-defined]
        if rollout is None:
            raise ConfigError("play needs a RolloutCallback; give the section rollout")
        bars = [each for each in self.callbacks if each is not rollout]  # type: ignore[attr-defined]
        kind = self.strategy.root_device.type
        fabric = Fabric(accelerator=kind, devices=self.num_devices, num_nodes=self.num_nodes, callbacks=bars)
        fabric.launch()
        for bar in (each for each in bars if isinstance(each, ProgressBar) and not fabric.is_global_zero):
            bar.disable()
        with fabric.rank_zero_first(local=True):
            datamodule.prepare_data()
        tasks = datamodule.read(split)[:max_tasks]
        folder = unused(Path(output))
        model.configure_model()
        step = 0 if ckpt_path is None else _load(model, Path(ckpt_path))
        playable = rollout.attach(fabric, model, tasks, folder, policy_version=lambda: step)
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


def _load(model: StepwiseModule, path: Path) -> int:
    """Give it the weights of a checkpoint, and return how many optimizer steps these have behind them."""
    checkpoint = read_checkpoint(path)
    weights = checkpoint.state_dict
    model.on_load_checkpoint({"state_dict": weights})  # which says it when they are another model's
    model.load_state_dict(weights)
    return checkpoint.step


def check_optimization(trainer: pl.Trainer) -> None:
    """Raises ``ConfigError`` for what Lightning does only where it optimizes by itself, and names what does it here."""
    number = trainer.accumulate_grad_batches
    given = "" if number == 1 else f"trainer.accumulate_grad_batches={number}"
    if any(isinstance(each, GradientAccumulationScheduler) for each in trainer.callbacks):  # type: ignore[attr-defined]
        given = "GradientAccumulationScheduler"
    if given:
        raise ConfigError(
            f"{given} has nothing to add: gradients of all the micro-batches of an optimizer step are summed anyway; "
            "use model.max_tokens_per_micro_batch for the size of one, and data.tasks_per_iteration with "
            "data.mini_batches for that of a step"
        )
    if trainer.gradient_clip_val is not None:
        raise ConfigError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} is not for manual optimization; use "
            f"model.max_grad_norm={trainer.gradient_clip_val}"
        )
    if trainer.check_val_every_n_epoch == 0:
        raise ConfigError(
            "trainer.check_val_every_n_epoch=0 is no interval; use 1 or more, or trainer.limit_val_batches=0 for no "
            "validation"
        )
    if trainer.precision == "64-true":
        raise ConfigError("trainer.precision=64-true is more than any engine samples with; use 32-true")


def check_launcher(trainer: pl.Trainer) -> None:
    """Raises ``ConfigError`` where processes would wait for others that never come, or run each by itself."""
    expected = trainer.num_nodes * trainer.num_devices
    for name, environment_class, variable in _LAUNCHERS:
        if environment_class.detect():
            started = int(os.environ[variable])
            if started != expected:
                raise ConfigError(
                    f"{name} started {started} processes, but trainer.num_nodes={trainer.num_nodes} times "
                    f"trainer.devices={trainer.num_devices} are {expected}; make them equal (docs/machines.md)"
                )
            return
    environment = getattr(trainer.strategy, "cluster_environment", None)
    known = {"NODE_RANK", "GROUP_RANK"} & os.environ.keys() and "MASTER_ADDR" in os.environ
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and not known:
        raise ConfigError(
            f"trainer.num_nodes={trainer.num_nodes}, but nothing says which of the machines this is, and where the "
            f"first one; start it on each with torchrun --nnodes {trainer.num_nodes} --node_rank K --master_addr HOST "
            f"--nproc_per_node {trainer.num_devices}, or with srun (docs/machines.md)"
        )
