"""The callback that leaves a Hugging Face folder behind when training ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lit_stepwise.errors import StepwiseError
from lit_stepwise.export.card import METRICS, Provenance
from lit_stepwise.export.folder import AdapterFormat, Dtype, Export
from lit_stepwise.export.run import config_in, metrics_in
from lit_stepwise.training import StepwiseModule

T = TypeVar("T")


class ExportCallback(pl.Callback):
    """When training ends, writes the folder that ``lit-stepwise export`` would make of a checkpoint.

    Args:
        output: folder to make; by default ``model`` in that of the run.
        adapter: of a run with model.lora. merged: weights with the adapter in them. separate: the adapter alone, as
            PEFT saves one.
        dtype: of the weights; by default that of model.model_path, as its config.json says.
    """

    def __init__(
        self, output: str | None = None, adapter: AdapterFormat = "merged", dtype: Dtype | None = None
    ) -> None:
        self.output = output
        self.adapter: AdapterFormat = adapter
        self.dtype: Dtype | None = dtype
        self._planned: Export | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises ``ConfigError`` for what could not be written in the end."""
        if stage != "fit":
            return
        module = cast(StepwiseModule, pl_module)
        output = self.output or str(_folder_of(trainer) / "model")
        self._planned = _of_first_rank(
            trainer, lambda: Export.plan(output, module.model_path, module.lora is not None, self.adapter, self.dtype)
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Every rank takes part, as weights may be sharded; the first writes."""
        policy = cast(StepwiseModule, pl_module).policy
        assert self._planned is not None
        assert policy is not None
        planned, model, step = self._planned, policy.language_model, trainer.global_step
        folder = _folder_of(trainer)
        tensors = planned.tensors(model)

        def write() -> None:
            try:
                metrics = metrics_in(folder, tuple(METRICS), step)
                planned.write(tensors, model, Provenance(step, metrics, config_in(folder)))
            finally:
                deque(tensors, maxlen=0)  # the other ranks take part in those that could not be written, too

        if not trainer.is_global_zero:
            deque(tensors, maxlen=0)
        _of_first_rank(trainer, write)
        rank_zero_info(f"wrote {planned.output}: the policy after {step} optimizer steps, in {planned.dtype}")


def _folder_of(trainer: pl.Trainer) -> Path:
    """All ranks ask together."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def _of_first_rank(trainer: pl.Trainer, act: Callable[[], T]) -> T:
    """What ``act`` gives there, on every rank; or its error, so that none waits in vain."""
    found: T | StepwiseError | None = None
    if trainer.is_global_zero:
        try:
            found = act()
        except StepwiseError as error:
            found = error
    found = trainer.strategy.broadcast(found)
    if isinstance(found, StepwiseError):
        raise found
    return cast(T, found)
