"""The trainer's own logprobs of before an iteration: computed once, kept in checkpoints, or not needed at all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lit_stepwise.algo import KLPenalty, RolloutCorrection
from lit_stepwise.testing import CountdownTasks, exact_logprobs, save_tiny_model
from lit_stepwise.training import Lora, StepwiseModule, TaskDataModule
from lit_stepwise.training.experience import unpack
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.training.scoring import logprobs_of
from lit_stepwise.types import (
    Feedback,
    MiniBatch,
    Rollout,
    StepSample,
    StopReason,
    Task,
    Trajectory,
    Turn,
    VersionSpan,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of small machines


class Plays(pl.Callback):
    """Deals out samples in place of a ``RolloutCallback``, and looks on."""

    def __init__(self, save_after: tuple[int, Path] | None = None, staleness: int = 0) -> None:
        self.save_after = save_after
        self.staleness = staleness
        self.batches: list[MiniBatch] = []
        self.metrics: list[dict[str, Any]] = []
        self.before: PolicyModel | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.datamodule.player = self
        pl_module.staleness = self.staleness
        self.module = pl_module

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = deepcopy(pl_module.policy)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: MiniBatch, batch_idx: int) -> None:
        self.batches.append(batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.datamodule.advance()
        self.metrics.append(dict(trainer.callback_metrics))
        if self.save_after is not None and trainer.global_step == self.save_after[0]:
            trainer.save_checkpoint(self.save_after[1])

    def evaluate(self, tasks: Sequence[Task]) -> Rollout:
        raise NotImplementedError

    def collect(self, iteration: int) -> list[StepSample]:
        # always played by the weights of the beginning
        turn = Turn([1], [2, 3], [-0.5, -0.25], [VersionSpan(0, 2)], "", Feedback("", {"goal": iteration + 0.5}))
        played = [Trajectory("a", 0, 0, [turn], StopReason.DONE)]
        self.module.on_rollout_end(Rollout("train", iteration, 0, played))
        draw = torch.Generator().manual_seed(iteration)
        return [sample(draw, group, 2 + turn, 3 + 2 * turn) for turn in range(3) for group in range(4)]


def sample(draw: torch.Generator, group: int, num_prompt: int, num_response: int) -> StepSample:
    ids = torch.randint(0, 250, (num_prompt + num_response,), generator=draw).tolist()
    return StepSample(
        prompt_ids=ids[:num_prompt],
        response_ids=ids[num_prompt:],
        response_mask=[i != 1 for i in range(num_response)],
        rollout_logprobs=(torch.randn(num_response, generator=draw) - 6).tolist(),
        advantages=torch.randn(num_response, generator=draw).tolist(),
        reward=0.0,
        group=group,
        sample=0,
        turn=0,
        policy_version=0,
        temperature=0.75,
    )


def fit(
    model_path: Path,
    plays: Plays,
    data: dict[str, Any],
    model: dict[str, Any] | None = None,
    epochs: int = 1,
    ckpt_path: Path | None = None,
) -> StepwiseModule:
    """Steps large enough for old logprobs to be seen to be old."""
    module = StepwiseModule(
        str(model_path),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        max_tokens_per_micro_batch=16,
        **({"old_logprobs": "trainer"} | (model or {})),
    )
    tasks = TaskDataModule(CountdownTasks(), train_files="4", tasks_per_iteration=4, **data)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, callbacks=[plays], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=tasks, ckpt_path=ckpt_path)
    return module


def test_every_step_of_an_iteration_has_the_logprobs_of_before_its_first(tiny_model: Path) -> None:
    plays = Plays()
    module = fit(tiny_model, plays, {"mini_batches": 2, "passes": 2})
    assert plays.before is not None
    assert [len(batch.samples) for batch in plays.batches] == [6] * 4
    for batch in plays.batches:
        plan = module._plan(batch.samples)
        with_same_plan = logprobs_of(lambda batch: plays.before(batch)[0], batch.samples, plan, "tree", module.device)
        for i, each in enumerate(batch.samples):
            assert list(each.old_logprobs) == with_same_plan[i]
            alone = exact_logprobs(plays.before.language_model, each.prompt_ids, each.response_ids, each.temperature)
            chosen = alone[range(len(each.response_ids)), list(each.response_ids)] * torch.tensor(each.response_mask)
            assert each.old_logprobs == pytest.approx(chosen.tolist(), abs=1e-5)
    gaps = [float(metrics["train/old_logprob_gap"]) for metrics in plays.metrics]
    assert gaps[:2] == gaps[2:]  # of the same mini-batches
    assert gaps[0] != gaps[1]
    own = [float(metrics["train/logprob_gap"]) for metrics in plays.metrics]
    assert [own[i] == pytest.approx(gaps[i], rel=1e-6) for i in range(4)] == [
        True,  # the first step is the only one whose own logprobs are the old ones
        False,
        False,
        False,
    ]


def test_an_iteration_of_one_step_uses_that_steps_own_and_says_so_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: StepwiseModule, samples: Any) -> Any:
        raise AssertionError("computed twice")

    monkeypatch.setattr(StepwiseModule, "with_old_logprobs", refuse)
    plays = Plays()
    with caplog.at_level(logging.INFO):
        fit(tiny_model, plays, {}, epochs=3)
    said = [record.getMessage() for record in caplog.records if "old_logprobs" in record.getMessage()]
    assert len(said) == 1
    assert "model.old_logprobs=trainer: an iteration is a single optimizer step" in said[0]
    assert len(plays.metrics) == 3
    for metrics in plays.metrics:
        assert metrics["train/old_logprob_gap"] == pytest.approx(float(metrics["train/logprob_gap"]), rel=1e-6)


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["all weights", "an adapter"])
def test_a_checkpoint_mid_iteration_holds_them_but_no_reference_and_resumes_to_the_same_weights(
    tiny_model: Path, tmp_path: Path, lora: Lora | None
) -> None:
    if lora:
        pytest.importorskip("peft")
    reference = save_tiny_model(tmp_path / "reference", seed=3)
    model = {"kl": KLPenalty(coefficient=0.5, estimator="k2"), "reference_path": str(reference), "lora": lora}
    data = {"mini_batches": 2, "passes": 2}
    plays = Plays(save_after=(1, tmp_path / "middle.ckpt"))
    alone = fit(tiny_model, plays, data, model)

    checkpoint = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    kept = unpack(checkpoint["TaskDataModule"]["samples"])
    assert [each.old_logprobs for each in kept] == [
        list(each.old_logprobs) for batch in plays.batches[:2] for each in batch.samples
    ]
    assert all(each.old_logprobs for each in kept)
    assert checkpoint["state_dict"].keys() == alone.state_dict().keys()
    assert not any("reference" in name for name in checkpoint["state_dict"])

    later = Plays()
    resumed = fit(tiny_model, later, data, model, ckpt_path=tmp_path / "middle.ckpt")
    assert [batch.index for batch in later.batches] == [1, 2, 3]
    paid, paid_alone = ([float(each["train/kl"]) for each in seen.metrics] for seen in (later, plays))
    assert paid == paid_alone[1:]
    assert min(paid) > 0
    for name, weight in alone.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_where_play_runs_ahead_they_are_computed_and_corrected_by_default_and_a_line_says_so(
    tiny_model: Path, mini_batches: int, caplog: pytest.LogCaptureFixture
) -> None:
    plays = Plays(staleness=1)
    with caplog.at_level(logging.INFO):
        module = fit(tiny_model, plays, {"mini_batches": mini_batches}, {"old_logprobs": None}, epochs=2)
    (said,) = [each.getMessage() for each in caplog.records if "rollout.staleness" in each.getMessage()]
    assert said == (
        "left open, and chosen at rollout.staleness=1: model.old_logprobs=trainer, model.correction.token_cap=2.0"
    )
    assert module.objective.correction == RolloutCorrection(token_cap=2.0)
    for batch, metrics in zip(plays.batches, plays.metrics, strict=True):
        assert "train/token_cap_fraction" in metrics
        # those of before the iteration: its first step's own, which are computed beforehand only if there is another
        assert [bool(each.old_logprobs) for each in batch.samples] == [mini_batches > 1] * len(batch.samples)
        same = float(metrics["train/old_logprob_gap"]) == pytest.approx(float(metrics["train/logprob_gap"]), rel=1e-6)
        assert same == (batch.index == 0)
        played = {name: float(metrics[f"rollout/{name}"]) for name in ("reward", "staleness", "stale_0", "stale_1")}
        age = batch.iteration
        assert played == {"reward": age + 0.5, "staleness": age * mini_batches, "stale_0": 1 - age, "stale_1": age}
        assert float(metrics["rollout/stale_2"]) == 0.0


def test_by_default_nothing_is_computed_again(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plays = Plays()
    module = StepwiseModule(str(tiny_model))
    monkeypatch.setattr(StepwiseModule, "with_old_logprobs", lambda self, samples: 1 / 0)
    tasks = TaskDataModule(CountdownTasks(), train_files="4", tasks_per_iteration=4, mini_batches=2)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, callbacks=[plays], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        trainer.fit(module, datamodule=tasks)
    assert "old_logprobs" not in caplog.text
    assert [list(each.old_logprobs) for batch in plays.batches for each in batch.samples] == [[]] * 12
