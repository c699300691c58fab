"""One progress bar for the whole run, which moves while trajectories are played, too."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from lit_stepwise.types import Rollout, Trajectory


class RolloutProgressBar(ProgressBar):
    """Optimizer steps of the run, the phase it is in, and the metrics logged with ``prog_bar=True``.

    ``playing 37/128: 40%|████      | 12/30 [00:31<00:47, reward=0.46, accuracy=0.52]``
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm[Any] | None = None
        self._phase = ""
        self._played = 0
        self._to_play = 0
        self._shown: dict[str, str] = {}

    def disable(self) -> None:
        """Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """The opposite of ``disable``."""
        self._enabled = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Only rank 0 shows a bar."""
        super().setup(trainer, pl_module, stage)
        if not trainer.is_global_zero:
            self.disable()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar where a resumed run stands."""
        self._open(total=int(trainer.estimated_stepping_batches), initial=trainer.global_step, unit="step")
        self._show_metrics(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One optimizer step further."""
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            self._show_metrics(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the new accuracy; that of the sanity check stands until there is another."""
        self._show_metrics(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the finished bar on the screen."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal tidy."""
        self._close()

    def on_rollout_start(self, stage: str, iteration: int, num_trajectories: int) -> None:
        """Say what is played now; outside of training the bar counts trajectories."""
        self._phase = {"train": "playing", "evaluate": "evaluating"}[stage]
        self._played, self._to_play = 0, num_trajectories
        if self._bar is None:
            self._open(total=num_trajectories, initial=0, unit="trajectory")
        self._describe()

    def on_trajectory_end(self, trajectory: Trajectory) -> None:
        """One trajectory further."""
        self._played += 1
        self._describe()

    def on_rollout_end(self, rollout: Rollout) -> None:
        """From here on it trains."""
        if self._bar is not None and self._bar.unit == "trajectory":
            self._close()
        elif self._bar is not None:
            self._bar.set_description("training")

    def _open(self, total: int, initial: int, unit: str) -> None:
        if self._enabled:
            self._bar = tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True, desc=self._phase)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _describe(self) -> None:
        if self._bar is not None:
            self._bar.set_description(f"{self._phase} {self._played}/{self._to_play}", refresh=False)
            self._bar.update(self._played - self._bar.n if self._bar.unit == "trajectory" else 0)

    def _show_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = self.get_metrics(trainer, pl_module)
        self._shown |= {name: f"{value:.3f}" for name, value in metrics.items() if name != "v_num"}
        if self._bar is not None:
            self._bar.set_postfix(self._shown)
