"""The last lines of a run: what was gained, where its time went, where its files are, and what to do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lit_stepwise.training.clock import PhaseClock, added, clock_time


class RunSummary(pl.Callback):
    """Says it. The accuracy before is that of the sanity check, so use ``num_sanity_val_steps: -1``.

    ::

        accuracy  46.1% before, 96.9% after (+50.8 points), best 96.9% at step 8
        time      12 steps in 107 s: play 52.1 s (49 %), train 31.0 s (29 %), evaluate 15.3 s (14 %), ...
        files     runs/tiny/version_0
        next      lit-stepwise show runs/tiny/version_0
                  lit-stepwise export runs/tiny/version_0/checkpoints/last.ckpt model/
    """

    metric = "val/accuracy"

    def __init__(self) -> None:
        self._before: float | None = None
        self._last: float | None = None
        self._best: tuple[float, int] | None = None
        self._clock = PhaseClock()
        self._seconds: dict[str, float] = {}
        self._num_steps = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._clock = PhaseClock()
        self._num_steps = 0

    def on_phase(self, phase: str) -> None:
        """What the training thread turns to, from the RolloutCallback."""
        self._clock.enter(phase)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Another optimizer step of this very fit."""
        self._num_steps += 1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the accuracy; after a mere validation, whose metrics Lightning prints, say where its files are."""
        if trainer.state.fn != TrainerFn.FITTING:
            self.on_test_end(trainer, pl_module)
        if self.metric not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.metric])
        if trainer.sanity_checking and self._before is None and not trainer.global_step:  # else a resumed run knows
            self._before = value
        self._last = value
        if self._best is None or value > self._best[0]:
            self._best = (value, trainer.global_step)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where its files are."""
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: all ranks have to ask
        rank_zero_only(print)(f"files     {folder}")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say it."""
        self._count()
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: all ranks have to ask
        if trainer.ckpt_path is not None and not self._num_steps:
            rank_zero_info(
                f"nothing was left to train: {trainer.ckpt_path} is the end of its run, step {trainer.global_step} "
                f"with trainer.max_epochs={trainer.max_epochs} and max_steps={trainer.max_steps}; raise them to go on"
            )
        self._print(trainer.global_step, Path(folder), trainer.checkpoint_callback)

    def state_dict(self) -> dict[str, Any]:
        """Survives a resume, so that the gain and the time are those of the whole run."""
        self._count()
        return {"before": self._before, "last": self._last, "best": self._best, "seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._before, self._last = state_dict["before"], state_dict["last"]
        self._best = tuple(state_dict["best"]) if state_dict["best"] else None
        self._seconds = state_dict["seconds"]

    def _count(self) -> None:
        self._seconds = added(self._seconds, self._clock.lap())

    @rank_zero_only
    def _print(self, num_steps: int, folder: Path, checkpoint: Any) -> None:
        if self._before is not None and self._last is not None and self._best is not None:
            gain = 100 * (self._last - self._before)
            best = f"best {self._best[0]:.1%} at step {self._best[1]}"
            print(f"accuracy  {self._before:.1%} before, {self._last:.1%} after ({gain:+.1f} points), {best}")
        total = sum(self._seconds.values())
        print(f"time      {num_steps} steps in {_duration(total)}: {_with_shares(self._seconds)}")
        print(f"files     {folder}")
        print(f"next      lit-stepwise show {folder}")
        print(f"          lit-stepwise report {folder}")
        saved = getattr(checkpoint, "last_model_path", "") or getattr(checkpoint, "best_model_path", "")
        if saved:
            print(f"          lit-stepwise export {_short(saved)} model/")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else clock_time(seconds)


def _with_shares(seconds: dict[str, float]) -> str:
    """``play 52.1 s (49 %), train 31.0 s (29 %)``, the largest first; nothing that is less than half a percent."""
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda each: -each[1])
    return ", ".join(f"{name} {value:.1f} s ({value / total:.0%})" for name, value in ordered if value >= total / 200)


def _short(path: str) -> Path:
    """As seen from the working directory, where it is below that."""
    try:
        return Path(path).relative_to(Path.cwd())
    except ValueError:
        return Path(path)
