"""What the LightningModule hears of play and of its own steps, and where it writes it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from lit_stepwise.algo.filters import Selection
from lit_stepwise.training.clock import PhaseClock
from lit_stepwise.training.evaluation import EvaluationMetrics
from lit_stepwise.training.metrics import UpdateMetrics
from lit_stepwise.training.play_metrics import RolloutMetrics
from lit_stepwise.types import Rollout


class Logs(pl.LightningModule):
    """Metrics of play, of evaluation and of updates."""

    staleness: int

    def __init__(self) -> None:
        super().__init__()
        self.rollout_metrics = RolloutMetrics()
        self.evaluation_metrics = EvaluationMetrics()
        self.update_metrics: UpdateMetrics = UpdateMetrics()
        self._clock = PhaseClock()
        self._phases: dict[str, float] = {}
        self._spent = 0.0
        """Seconds since the last iteration was handed over that stand under another name."""
        self._rollout: Rollout | None = None
        self._selection: dict[str, float] = {}
        self._evaluated = 0
        """Optimizer steps behind the weights that were evaluated; of a loaded checkpoint the Trainer does not know."""

    # ---- training

    def on_rollout_end(self, rollout: Rollout) -> None:
        """Called through the RolloutCallback's Fabric, when an iteration is handed over to be trained."""
        if rollout.stage == "train":
            seconds = self._clock.lap()
            whole, prepare = sum(seconds.values()), seconds.get("prepare", 0.0)
            other = whole - prepare - seconds.get("save", 0.0) - rollout.wait_seconds - self._spent
            # the first has no iteration before it, from which on it could be measured
            phases = {"iteration": whole, "prepare": prepare, "other": other}
            self._phases = phases if rollout.cycle_seconds else {}
            self._spent = 0.0
            self._rollout = rollout

    def on_phase(self, phase: str) -> None:
        """The same, whenever the training thread turns to something else."""
        self._clock.enter(phase)

    def on_selection(self, selection: Selection) -> None:
        """The same, once an iteration."""
        self._selection = selection.metrics

    def log_update(self, values: dict[str, float]) -> None:
        """``values`` and the metrics of an optimizer step; with the first of an iteration what was played for it."""
        values = self.update_metrics.result() | values
        self.log_dict(values, logger=False, batch_size=1)
        self._spent += values["seconds/train"]
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._to_loggers(values | {"epoch": self.current_epoch})
        computed, saved = values["tokens/forwarded"], values["tokens/saved"]
        shown = {"computed/trained": computed / max(1, values["tokens/trained"]), "saved": saved / (computed + saved)}
        self.log_dict(shown, prog_bar=True, logger=False, batch_size=1)
        if self._rollout is not None:
            self._log_rollout(self._rollout)
            self._rollout = None

    def _log_rollout(self, rollout: Rollout) -> None:
        step = self.global_step - 1
        num_steps = int(self.trainer.num_training_batches)
        self.rollout_metrics.update(rollout, step, num_steps, max_age=self.staleness + 1, phases=self._phases)
        values = self.rollout_metrics.result() | self._selection
        self.log("reward", values["rollout/reward"], prog_bar=True, logger=False, batch_size=1)
        self.log_dict(values, logger=False, batch_size=1)
        self._to_loggers(values)  # self.log would repeat them at every further step of the iteration

    def _to_loggers(self, values: dict[str, float]) -> None:
        """At once: Lightning would do so after the checkpoint of the step is written, and a kill between lose them."""
        for logger in self.loggers:
            logger.log_metrics(values, step=self.global_step - 1)

    # ---- evaluation

    def validation_step(self, batch: Rollout, batch_idx: int) -> None:
        """Count what was played."""
        self._count(batch)

    def on_validation_epoch_end(self) -> None:
        """Accuracy and the rest, over all ranks."""
        values = self._log_evaluation("val")
        self.log("accuracy", values["val/accuracy"], prog_bar=True, logger=False, batch_size=1)

    def test_step(self, batch: Rollout, batch_idx: int) -> None:
        """Count what was played."""
        self._count(batch)

    def on_test_epoch_end(self) -> None:
        """Accuracy and the rest, over all ranks."""
        self._log_evaluation("test")

    def _count(self, rollout: Rollout) -> None:
        self.evaluation_metrics.update(rollout)
        self._evaluated = rollout.policy_version

    def _log_evaluation(self, prefix: str) -> dict[str, float]:
        values = self.evaluation_metrics.result(prefix)
        self._spent += values["seconds/evaluate"]
        if self.trainer.state.fn != TrainerFn.FITTING:  # then Lightning prints and returns what it logs, at that step
            self.log_dict(values | {"step": float(self._evaluated)}, batch_size=1)
            return values
        self.log_dict(values, logger=False, batch_size=1)
        for logger in self.loggers:  # self.log would give them the step before, and those of the sanity check to nobody
            logger.log_metrics(values, step=self._evaluated)
            logger.save()
        return values

    def predict_step(self, batch: Rollout, batch_idx: int) -> list[dict[str, Any]]:
        """The trajectories, as plain dictionaries, since Lightning refuses to move frozen dataclasses."""
        return [asdict(trajectory) for trajectory in batch.trajectories]
