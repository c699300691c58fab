"""What Lightning forgets when a run goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lit_stepwise.errors import ConfigError


def owe_evaluation(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Have the evaluation played that was due right after the checkpoint, and with it the end of the epoch.

    A checkpoint of ``every_n_train_steps`` is written between an optimizer step and the evaluation that follows, and
    Lightning takes what follows for done. Here the loops are set to where they are in the middle of that evaluation,
    which Lightning plays again. Whether it had been played before the run ended is not known.
    """
    loops = checkpoint["loops"]["fit_loop"]
    trained = loops["epoch_loop.batch_progress"]
    of_a_step = trained["total"]["completed"] == trained["total"]["processed"] - 1
    if not (of_a_step and trainer.enable_validation and _is_due(trainer, loops)):
        return
    evaluated = loops["epoch_loop.val_loop.batch_progress"]
    evaluated["is_last_batch"] = False
    for span in ("current", "total"):
        trained[span]["completed"] = trained[span]["processed"]
        evaluated[span] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def check_bounds(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Raises ``ConfigError`` where the checkpoint is beyond what the Trainer is to train."""
    loops = checkpoint["loops"]["fit_loop"]
    epoch, epochs = loops["epoch_progress"]["current"], trainer.max_epochs
    # a checkpoint of the last optimizer step of an iteration is written before Lightning closes its epoch
    trained = epoch["processed"] + (
        epoch["started"] > epoch["processed"] and loops["epoch_loop.batch_progress"]["is_last_batch"]
    )
    if epochs is not None and -1 < epochs < trained:
        raise ConfigError(
            f"trainer.max_epochs={epochs}, but the checkpoint has {trained} iterations behind it; raise max_epochs, or "
            "give an earlier checkpoint"
        )


def check_shared(checkpoints: Sequence[str]) -> None:
    """Raises ``ConfigError`` where the checkpoints to go on from, those that each rank found, are not one."""
    if len(set(checkpoints)) > 1:
        found = [f"rank {rank} goes on from {path or 'none'}" for rank, path in enumerate(checkpoints)]
        other = next(rank for rank, path in enumerate(checkpoints) if path != checkpoints[0])
        raise ConfigError(
            f"ckpt_path: {found[0]}, and {found[other]}; where trainer.default_root_dir is a folder that all machines "
            "share and see alike they find the same, or else give all of them one --ckpt_path"
        )


def _is_due(trainer: pl.Trainer, loops: dict[str, Any]) -> bool:
    """Whether the Trainer's settings have an evaluation after the optimizer step that the checkpoint is of."""
    every = trainer.check_val_every_n_epoch
    interval: Any = trainer.val_check_interval
    if not isinstance(interval, int | float):  # by the clock
        return False
    trained = loops["epoch_loop.batch_progress"]
    if every is None:
        return bool(trained["total"]["ready"] % interval == 0)
    num_batches = len(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
    steps = interval if isinstance(interval, int) else max(1, int(num_batches * interval))
    epoch = loops["epoch_progress"]["current"]["processed"] + 1
    return bool(epoch % every == 0 and trained["current"]["ready"] % steps == 0)
