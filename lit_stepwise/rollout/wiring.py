"""How play finds its place in a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric import Fabric

from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import TaskData

HOOKS = {
    "on_deal": ("deal",),
    "on_phase": ("phase",),
    "on_rollout_start": ("stage", "iteration", "num_trajectories"),
    "on_engine_step": ("num_generating", "num_executing"),
    "on_turn_end": ("turn", "task_id"),
    "on_trajectory_end": ("trajectory",),
    "on_rollout_end": ("rollout",),
    "on_selection": ("iteration", "trajectories", "advantages", "selection"),
}
"""What callbacks may have besides Lightning's hooks, and by which names each gets its arguments."""

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


def check_hooks(callbacks: Iterable[Any]) -> None:
    """Raises ``ConfigError`` for a hook that asks for what it is not given; it would fail after a round of play."""
    for each in callbacks:
        for hook, given in HOOKS.items():
            method = getattr(each, hook, None)
            if callable(method) and (unknown := _unknown(method, given)):
                raise ConfigError(
                    f"{type(each).__name__}.{hook} asks for {unknown}; it may name {', '.join(given)}, and leave out "
                    "what it does not need"
                )


def _unknown(method: Callable[..., Any], given: Sequence[str]) -> str:
    """What it asks for beyond that; empty where there is nothing."""
    for each in signature(method).parameters.values():
        if each.kind is Parameter.VAR_POSITIONAL:
            return f"*{each.name}"
        if each.kind is not Parameter.VAR_KEYWORD and each.default is Parameter.empty and each.name not in given:
            return each.name
    return ""


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
