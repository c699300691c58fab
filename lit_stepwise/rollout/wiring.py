"""How play finds its place in a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric import Fabric

from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import TaskData

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def data_of(trainer: pl.Trainer) -> TaskData:
    """Its data module. Raises ``ConfigError`` when that deals out no tasks."""
    data = getattr(trainer, "datamodule", None)
    if data is None or not hasattr(data, "player"):
        raise ConfigError(f"the RolloutCallback needs a TaskDataModule as datamodule of the Trainer; got {data!r}")
    return cast(TaskData, data)


def fabric_of(trainer: pl.Trainer, callbacks: list[Any]) -> Fabric:
    """A Fabric on the processes and devices the Trainer already has; it launches nothing of its own."""
    strategy = trainer.strategy
    on_cpu = strategy.root_device.type == "cpu"
    environment = getattr(strategy, "cluster_environment", None)
    fabric = Fabric(
        accelerator=strategy.root_device.type,
        devices=trainer.num_devices if on_cpu else trainer.device_ids,
        num_nodes=trainer.num_nodes,
        strategy="ddp" if trainer.world_size > 1 else "auto",  # for ranks and collectives; no model is set up on it
        precision=trainer.precision,
        plugins=[environment] if environment else None,
        callbacks=callbacks,
        loggers=list(trainer.loggers),
    )
    fabric.launch()
    return fabric


def load_tokenizer(model_path: str) -> Any:
    """That of the model. Raises ``ConfigError`` when there is none."""
    from transformers import AutoTokenizer  # seconds of import that other commands need not pay

    folder = Path(model_path)
    refused = f"model.model_path={model_path!r} {{}}; give a folder with a Hugging Face model, or the name of one"
    # of a folder without, transformers makes an empty one
    if folder.is_dir() and not any(file for name in _TOKENIZER_FILES for file in folder.glob(name)):
        raise ConfigError(refused.format("holds no tokenizer"))
    try:
        return AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        what = "holds no tokenizer" if folder.exists() else "is no folder, and no known model has that name"
        raise ConfigError(refused.format(what)) from error


def will_train(trainer: pl.Trainer, iteration: int) -> bool:
    """Whether the Trainer's bounds let ``iteration`` be trained."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    within_epochs = epochs is None or epochs < 0 or iteration < epochs
    return within_epochs and (steps < 0 or iteration * trainer.num_training_batches < steps)
