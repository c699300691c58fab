"""The callback that plays for a Trainer."""

from __future__ import annotations

from collections import ChainMap
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lit_stepwise.errors import MismatchError
from lit_stepwise.interfaces import Policy, TaskData
from lit_stepwise.rollout.interrupt import end_at_once_when_asked_again
from lit_stepwise.rollout.phases import Draw
from lit_stepwise.rollout.player import TaskPlayer
from lit_stepwise.rollout.resume import check_bounds, check_shared, owe_evaluation
from lit_stepwise.rollout.wiring import check_hooks, data_of, fabric_of, will_train
from lit_stepwise.store.write import Lineage, unused
from lit_stepwise.types import Deal, MiniBatch


class RolloutCallback(TaskPlayer, pl.Callback):
    """Plays an iteration whenever the train loader asks for one, and validation tasks whenever validation does."""

    _resumed_store: str | None = None
    _loaded_step: int | None = None
    """``global_step`` of the weights that were loaded, which a Trainer takes over for ``fit`` alone."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check everything that can be checked before a weight is loaded."""
        self._loaded_step = None
        data = data_of(trainer)
        policy = cast(Policy, pl_module)
        policy.staleness = self.staleness
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        check_hooks(others)
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "trajectories"
        playable = self.attach(
            fabric=fabric_of(trainer, [*others, pl_module]),
            policy=policy,
            tasks=data.tasks,
            # a logger that gives each run no folder of its own leaves what earlier ones played there
            folder=unused(folder) if stage == "fit" else folder,
            policy_version=lambda: trainer.global_step if self._loaded_step is None else self._loaded_step,
            draw=lambda iteration: self._draw(data, iteration),
            wanted=lambda iteration: will_train(trainer, iteration),
        )
        check_shared(self.live.collector.from_all_ranks(str(trainer.ckpt_path or "")))
        data.keep(playable)
        data.player = self

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say in the store which run this one goes on from, and where."""
        if self._resumed_store is not None and trainer.is_global_zero:
            lineage = Lineage(Path(self._resumed_store), data_of(trainer).iteration, trainer.global_step)
            self.live.store.begin(lineage)

    def state_dict(self) -> dict[str, Any]:
        """Where the trajectories are, for a run that goes on from here."""
        return {"store": str(self._live.store.folder.absolute()) if self._live else self._resumed_store}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where those before are."""
        self._resumed_store = state_dict["store"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Play here, where progress can be shown; on resume Lightning may skip this hook and the loader plays."""
        data_of(trainer).ensure_iteration()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A sign of life."""
        self.live.heartbeat.beat("training")
        self._turn_to("train")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Before anything is learnt from an engine, see whether it played the policy that is trained."""
        if self.live.proven or self.live.handed_over is None:  # a resumed run may first train what it had stored
            return
        self.live.proven = True
        gap = cast(Policy, pl_module).logprob_gap()
        message = (
            f"in the first optimizer step the engine's logprobs are {gap:.4f} nats off the trainer's in the mean "
            f"(rollout.max_logprob_gap={self.max_logprob_gap})"
        )
        if self.sampling.top_p < 1:
            rank_zero_warn(
                f"{message}; that is how much rollout.sampling.top_p={self.sampling.top_p} biases each ratio"
            )
        elif not gap <= self.max_logprob_gap:
            raise MismatchError(
                f"{message}, and nothing was learnt from them. The probe after the weight sync was fine, so look at "
                "what sampling adds: engine_kwargs, a chat template of its own, logits processors, raw logprobs"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Runs before ModelCheckpoint, which Lightning keeps last, so that a checkpoint holds the new cursor."""
        data = data_of(trainer)
        data.advance()
        self._keep_learnt(batch, cast(Policy, pl_module), trainer.global_step - 1)
        pl_module.log("seconds/store", self.live.store.take_seconds(), batch_size=1)
        self.live.heartbeat.beat("training")
        self._turn_to("other")
        # Lightning does not count the epoch in which a run resumes as started, so that after a second resume it would
        # take the last epoch for one still to come and train an iteration too many
        for progress in (trainer.fit_loop.epoch_progress.total, trainer.fit_loop.epoch_progress.current):
            progress.ready = progress.started = data.iteration + 1  # type: ignore[attr-defined]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """An evaluation that a kill took away is played after all. Raises ``ConfigError`` beyond ``max_epochs``."""
        if trainer.state.fn == TrainerFn.FITTING:
            check_bounds(trainer, checkpoint)
            owe_evaluation(trainer, checkpoint)
        else:
            self._loaded_step = checkpoint["global_step"]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All of validation counts, not its play alone."""
        self._turn_to("evaluate")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluation is over."""
        self._turn_to("other")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning says when it begins to save, and not when it has ended: that is when the next phase begins."""
        self._turn_to("save")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free the engine and the environment's workers."""
        self.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no process behind."""
        if isinstance(exception, KeyboardInterrupt):
            end_at_once_when_asked_again(trainer)
        self.close()

    def _draw(self, data: TaskData, iteration: int) -> Draw:
        """What ``iteration`` plays, once the callbacks have had their say; that of the first rank holds on all."""
        collector, tasks = self.live.collector, data.training_tasks
        prompt_tokens = [collector.prompt_tokens[id(task)] for task in tasks]
        deal = Deal(iteration, tasks, prompt_tokens, [1.0] * len(tasks), self.limits.max_turns)
        collector.fabric.call("on_deal", deal=deal)
        deal.weights, deal.max_turns = collector.fabric.broadcast((deal.weights, deal.max_turns))
        deal.check(self.limits)
        weights = deal.weights
        return Draw(data.tasks_for(iteration, weights), data.further_tasks(iteration, weights), deal.max_turns)

    def _keep_learnt(self, batch: MiniBatch, policy: Policy, step: int) -> None:
        """What the trainer gave the tokens of the optimizer step that is done."""
        collector = self.live.collector
        logprobs = dict(ChainMap(*collector.from_all_ranks(policy.learnt_logprobs(batch.samples))))
        if collector.fabric.is_global_zero:
            self.live.store.learn(batch, logprobs, step)
