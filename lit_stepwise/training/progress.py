"""How far a run is: lines that move in a terminal, and a plain line an iteration anywhere."""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from lit_stepwise.training.activity import WORDS, Activity, drawn, in_order
from lit_stepwise.training.bottom_lines import BottomLines, Ticker, is_terminal
from lit_stepwise.training.clock import PhaseClock, clock_time, shares
from lit_stepwise.types import Rollout, Trajectory

_DRAW_SECONDS = 0.5
_SAY_SECONDS = 60.0
_NUM_LINES = 4


class RolloutProgressBar(ProgressBar):
    """Where the run is, which phase it is in, when both will be over, and the metrics logged with ``prog_bar=True``.

    ::

        step 3/12  reward 0.461  accuracy 0.523  9.8 s, 1:28 left  (play 5.2, train 3.1, evaluate 1.2, save 0.3)

        run      ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━   3/12              0:30, 1:28 left
        playing  ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 37/128 8 executing  0:02, 0:03 left
        reward 0.461  accuracy 0.523  computed/trained 2.310  saved 0.710

    The first line is written at the end of each iteration. Where stdout and stderr are not both a terminal, it is all
    there is but for a line after every minute without one. What rank 0 plays and trains is what is counted; its share
    of the trajectories where there are several. Hooks of play may come from another thread, and only set numbers here.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._clock = PhaseClock()
        self._taken: dict[str, float] = {}
        """Seconds of each phase the last time."""
        self._now = Activity(WORDS["other"], time.perf_counter())
        self._play: Activity | None = None
        """What play does, wherever it runs."""
        self._run: Activity | None = None
        self._metrics: dict[str, float] = {}
        self._lines: BottomLines | None = None
        self._ticker: Ticker | None = None
        self._said_at = 0.0

    # ---- Lightning's hooks

    def disable(self) -> None:
        """Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """The opposite of ``disable``."""
        self._enabled = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Only rank 0 shows anything."""
        super().setup(trainer, pl_module, stage)
        if not trainer.is_global_zero:
            self.disable()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stand where a resumed run stands, and say what came before."""
        total, step = trainer.estimated_stepping_batches, trainer.global_step
        num_steps = int(total) if math.isfinite(total) else 0
        self._run = Activity("run", time.perf_counter(), done=step, first=step, total=num_steps)
        self._open()
        self._say_iteration(trainer, pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        """The module has planned its micro-batches by now."""
        self._now.total = len(getattr(pl_module, "step_plan", ()))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One micro-batch further."""
        self._now.done += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One optimizer step further."""
        if self._run is not None:
            self._run.done = trainer.global_step
            self._run.expected = self._run.in_proportion(time.perf_counter())
        self._take_metrics(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the new accuracy; that of the sanity check stands until there is another."""
        self._take_metrics(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The line of the iteration."""
        self._say_iteration(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the terminal to what comes."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say where it ended."""
        if self._ticker is not None:
            self._say(f"ended at {self._where()}")
        self._close()

    # ---- hooks of play

    def on_phase(self, phase: str) -> None:
        """What the training thread turns to."""
        ended = self._clock.phase
        self._taken[ended] = self._clock.enter(phase)
        self._now = Activity(WORDS.get(phase, phase), self._clock.began, expected=self._taken.get(phase))
        if phase != "other":
            self._open()

    def on_rollout_start(self, stage: str, iteration: int, num_trajectories: int) -> None:
        """What is played now; beside training when the training thread does something else."""
        is_here = self._clock.phase in ("play", "evaluate")
        self._play = self._now if is_here else Activity(WORDS["play"], time.perf_counter())
        self._play.done, self._play.total = 0, num_trajectories

    def on_engine_step(self, num_generating: int, num_executing: int) -> None:
        """How many environment steps are in flight."""
        if self._play is not None:
            self._play.note = f"{num_executing} executing" if num_executing else ""

    def on_trajectory_end(self, trajectory: Trajectory) -> None:
        """One trajectory further."""
        if self._play is not None:
            self._play.done += 1

    def on_rollout_end(self, rollout: Rollout) -> None:
        """Outside of training this is the end."""
        if self._run is None:
            self._close()

    # ---- showing

    def _open(self) -> None:
        if not self._enabled or self._ticker is not None:
            return
        self._said_at = time.perf_counter()
        if is_terminal():
            self._lines = BottomLines(sys.stdout, _NUM_LINES)
            self._ticker = Ticker(partial(self._lines.draw, self._drawn), _DRAW_SECONDS)
        else:
            self._ticker = Ticker(self._say_after_silence, _SAY_SECONDS / 4)
        self._ticker.start()

    def _close(self) -> None:
        self._run = self._play = None
        if self._ticker is not None:
            self._ticker.stop()
            self._ticker = None
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def _drawn(self, width: int) -> list[str]:
        return drawn(self._activities(), in_order(self._metrics), time.perf_counter(), width)

    def _activities(self) -> list[Activity]:
        """The run, what its training thread does, and play where that runs beside it."""
        run, now, play = self._run, self._now, self._play
        beside = play is not None and play is not now and play.done < play.total
        return [*([run] if run else []), now, *([play] if play and beside else [])]

    def _take_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = self.get_metrics(trainer, pl_module)
        self._metrics |= {name: float(value) for name, value in metrics.items() if name != "v_num"}  # type: ignore[arg-type]

    def _say_iteration(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seconds = self._clock.lap()
        self._take_metrics(trainer, pl_module)
        # an accuracy of iterations ago would look like one of this
        names = ["reward"] * ("train" in seconds) + ["accuracy"] * ("evaluate" in seconds)
        metrics = in_order({name: self._metrics[name] for name in names if name in self._metrics})
        parts = [self._steps(), *(f"{name} {value}" for name, value in metrics.items())]
        self._say("  ".join([*parts, f"{sum(seconds.values()):.1f} s{self._to_go()}", f"({shares(seconds)})"]))

    def _steps(self) -> str:
        run = self._run
        return f"step {run.count() or run.done}" if run else ""

    def _to_go(self) -> str:
        run = self._run
        left = run.left(time.perf_counter()) if run and run.done != run.total else None
        return f", {clock_time(left)} left" if left is not None else ""

    def _where(self) -> str:
        doing = [each.text() for each in self._activities() if each is not self._run]
        return ", ".join(filter(None, [self._steps(), *doing]))

    def _say_after_silence(self) -> None:
        if time.perf_counter() - self._said_at >= _SAY_SECONDS:
            self._say(self._where() + self._to_go())

    def _say(self, line: str) -> None:
        if self._enabled:
            self._said_at = time.perf_counter()
            print(line, flush=True)
