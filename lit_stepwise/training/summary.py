"""The last line of a run: what was gained, and where its files are."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only


class RunSummary(pl.Callback):
    """Prints accuracy before and after. Before is the sanity check, so use ``num_sanity_val_steps: -1``."""

    metric = "val/accuracy"

    def __init__(self) -> None:
        self._before: float | None = None
        self._last: float | None = None
        self._best: tuple[float, int] | None = None
        self._seconds = 0.0
        self._began = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the accuracy; the one before training goes to the loggers as step 0."""
        if self.metric not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.metric])
        if trainer.sanity_checking:
            self._note_before(trainer, value)
        self._last = value
        if self._best is None or value > self._best[0]:
            self._best = (value, trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say it."""
        self._seconds += time.monotonic() - self._began
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: all ranks have to ask
        self._print(trainer.global_step, folder)

    def state_dict(self) -> dict[str, Any]:
        """Survives a resume, so that the gain is that of the whole run."""
        seconds = self._seconds + time.monotonic() - self._began
        return {"before": self._before, "last": self._last, "best": self._best, "seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._before, self._last = state_dict["before"], state_dict["last"]
        self._best = tuple(state_dict["best"]) if state_dict["best"] else None
        self._seconds = state_dict["seconds"]

    def _note_before(self, trainer: pl.Trainer, value: float) -> None:
        if trainer.global_step or self._before is not None:  # resumed: the checkpoint knows
            return
        self._before = value
        for logger in trainer.loggers:
            logger.log_metrics({self.metric: value}, step=0)

    @rank_zero_only
    def _print(self, num_steps: int, folder: str) -> None:
        parts = [f"{num_steps} steps in {self._seconds:.0f} s"]
        if self._before is not None and self._last is not None and self._best is not None:
            gain = 100 * (self._last - self._before)
            parts.insert(0, f"accuracy {self._before:.1%} before, {self._last:.1%} after ({gain:+.1f} points)")
            parts.append(f"best {self._best[0]:.1%} at step {self._best[1]}")
        print(f"{', '.join(parts)}; files in {folder}")
