"""Leave Hugging Face folders behind while training goes on, for others to load.

trainer:
  callbacks:
    - class_path: callbacks.export_every.ExportEvery
      init_args: {every_n_steps: 100, keep: 2}
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from lit_stepwise.errors import ConfigError
from lit_stepwise.export import ExportCallback


class ExportEvery(pl.Callback):
    """Every so many optimizer steps writes ``exports/step-<n>`` below the run's folder, as ``ExportCallback`` does.

    A folder appears under its name when it is whole. Where one of that name exists already, the next free name is
    taken. For the policy as training ends use ``lit_stepwise.export.ExportCallback``.

    Args:
        every_n_steps: optimizer steps.
        keep: so many of the newest; older ones that this run wrote, before it was resumed too, are removed.
        adapter: of a run with model.lora. merged: weights with the adapter in them. separate: the adapter alone.
        dtype: of the weights; by default that of model.model_path.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        keep: int = 2,
        adapter: Literal["merged", "separate"] = "merged",
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> None:
        for name, value in {"every_n_steps": every_n_steps, "keep": keep}.items():
            if value < 1:
                raise ConfigError(f"ExportEvery {name}={value}; use 1 or more")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.adapter: Literal["merged", "separate"] = adapter
        self.dtype: Literal["float32", "bfloat16", "float16"] | None = dtype
        self.written: list[str] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises ``ConfigError`` for what could not be written later."""
        if stage == "fit":
            self._export(trainer, pl_module, step=0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every rank takes part, as weights may be sharded; the first writes and removes."""
        if trainer.global_step % self.every_n_steps == 0:
            export = self._export(trainer, pl_module, trainer.global_step)
            export.on_train_end(trainer, pl_module)
            self.written.append(str(export.output))
            old, self.written = self.written[: -self.keep], self.written[-self.keep :]
            if trainer.is_global_zero:
                for folder in old:
                    shutil.rmtree(folder, ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        """A resumed run removes what it wrote before."""
        return {"written": list(self.written)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.written = list(state_dict["written"])

    def _export(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> ExportCallback:
        """Checked and ready to write."""
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "exports"
        output = trainer.strategy.broadcast(_unused(folder / f"step-{step:06d}"))
        export = ExportCallback(str(output), self.adapter, self.dtype)
        export.setup(trainer, pl_module, "fit")
        return export


def _unused(folder: Path) -> Path:
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
