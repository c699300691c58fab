"""The whole loop on the Countdown game: what is read, written, trained and logged."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from lit_stepwise.algo import GroupRelative
from lit_stepwise.engines import TransformersEngine
from lit_stepwise.rollout import RolloutCallback
from lit_stepwise.store.read import open_run, rows_of
from lit_stepwise.testing import Countdown, CountdownTasks
from lit_stepwise.training import StepwiseModule, TaskDataModule
from lit_stepwise.types import Completion, Limits, Request

pytestmark = pytest.mark.slow


def rows(folder: Path) -> list[dict[str, str]]:
    """The metrics of a run, one row per optimizer step."""
    steps: dict[str, dict[str, str]] = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            steps.setdefault(row["step"], {}).update({name: value for name, value in row.items() if value})
    return [steps[step] for step in sorted(steps, key=int) if "train/loss" in steps[step]]


def stored_turns(folder: Path) -> list[dict[str, Any]]:
    """Of training, in order."""
    query = "select * from turns where stage = 'train' order by iteration, group_id, sample, turn"
    return rows_of(open_run(folder), query)


class Recorder(TransformersEngine):
    """Keeps what the engine read and wrote while the policy explored."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[tuple[int, str], Sequence[int]] = {}
        self.written: dict[tuple[int, str], Sequence[int]] = {}
        self.greedy = True

    def submit(self, request: Request) -> None:
        self.greedy = request.sampling.temperature == 0
        if not self.greedy:
            self.read[self.policy_version, request.request_id] = list(request.prompt_ids)
        super().submit(request)

    def step(self) -> list[Completion]:
        completions = super().step()
        if not self.greedy:
            self.written |= {(self.policy_version, each.request_id): list(each.response_ids) for each in completions}
        return completions


@pytest.mark.filterwarnings("ignore")
def test_the_store_holds_exactly_what_the_engine_read_and_wrote_and_all_of_it_is_trained(
    tiny_model: Path, tmp_path: Path
) -> None:
    engine = Recorder()
    rollout = RolloutCallback(
        engine, Countdown(), GroupRelative(), samples_per_task=3, limits=Limits(100, 200, 8, 3), deterministic=True
    )
    logger = CSVLogger(tmp_path, name="", version="run")
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, callbacks=[rollout], logger=logger, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    data = TaskDataModule(CountdownTasks(), train_files="4", val_files="2", tasks_per_iteration=3, mini_batches=3)
    trainer.fit(StepwiseModule(str(tiny_model)), datamodule=data)

    turns = stored_turns(tmp_path / "run")
    assert sorted(turn["prompt_ids"] + turn["response_ids"] for turn in turns) == sorted(
        [*engine.read[key], *engine.written[key]] for key in engine.read
    )
    metrics = rows(tmp_path / "run")
    trained = sum(float(row["tokens/trained"]) for row in metrics)
    generated = sum(float(row.get("tokens/generated", 0)) for row in metrics)
    assert trained == generated == sum(len(turn["response_ids"]) for turn in turns) > 100


def test_two_processes_play_and_learn_like_one(countdown: dict[str, Any], run: Any, tmp_path: Path) -> None:
    countdown["data"]["val_files"] = "1"  # so that the second process has nothing to evaluate
    one = run("fit", countdown, "--trainer.default_root_dir", "one")
    two = run(
        "fit", countdown, "--trainer.default_root_dir", "two", "--trainer.devices", "2", "--trainer.strategy", "ddp"
    )
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    for alone, together in zip(rows(tmp_path / "one/version_0"), rows(tmp_path / "two/version_0"), strict=True):
        for name in (
            "train/loss",
            "train/grad_norm",
            "train/entropy",
            "tokens/trained",
            "rollout/reward",
            "rollout/reward_shorter",
            "val/accuracy",
            "val/reward_shorter",
        ):
            if name in alone:
                assert float(together[name]) == pytest.approx(float(alone[name]), rel=1e-3, abs=1e-4), name
    assert (
        stored_turns(tmp_path / "one/version_0")[5]["prompt_ids"]
        == (stored_turns(tmp_path / "two/version_0")[5]["prompt_ids"])
    )


@pytest.mark.slow
def test_other_objectives_and_filters_run_from_the_command_line(
    countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    done = run(
        "fit", countdown, "--trainer.max_epochs", "2",
        "--model.loss", "GSPO", "--model.reduction", "constant", "--model.entropy_bonus", "0.01",
        "--model.kl.coefficient", "0.1", "--model.kl.estimator", "k2",
        "--model.old_logprobs", "trainer", "--model.correction.token_cap", "2.0",
        "--rollout.samples", "trajectory", "--rollout.advantage", "LeaveOneOut",
        "--rollout.filters.dynamic_sampling", "reward", "--rollout.filters.max_rounds", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((tmp_path / "runs/version_0/config.yaml").read_text())
    assert config["model"]["loss"]["init_args"] == {"turn_low": 3e-4, "turn_high": 4e-4, "per_token": False}
    (first, *_) = rows(tmp_path / "runs/version_0")
    for name in ("train/kl", "train/old_logprob_gap", "train/non_finite_fraction", "train/token_cap_fraction"):
        assert float(first[name]) >= 0
    assert float(first["rollout/groups_in"]) >= 2


def test_wandb_works_offline_without_a_key(countdown: dict[str, Any], run: Any, tmp_path: Path) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"offline": True, "save_dir": "logs"}}
    countdown["trainer"]["logger"] = logger
    done = run("fit", countdown, "--trainer.max_epochs", "1")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("logs/wandb/offline-run-*/*.wandb"))
    assert open_run(tmp_path / "runs").execute("select count(distinct iteration) from turns").fetchall() == [(1,)]


def test_the_last_lines_say_what_was_gained_and_where_the_files_are(countdown: dict[str, Any], run: Any) -> None:
    done = run("fit", countdown, "--trainer.max_epochs", "1")
    first, _, files, *following = done.stdout.splitlines()[-6:]
    assert first.startswith("accuracy  66.7% before")
    assert files == "files     runs/version_0"
    assert following == [
        "next      lit-stepwise show runs/version_0",
        "          lit-stepwise report runs/version_0",
        "          lit-stepwise export runs/version_0/checkpoints/last.ckpt model/",
    ]


def test_a_run_is_the_same_however_its_samples_are_packed(countdown: dict[str, Any], run: Any, tmp_path: Path) -> None:
    found = {}
    for packing in ("tree", "trajectory", "none"):
        done = run("fit", countdown, "--model.packing", packing, "--trainer.default_root_dir", packing)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / packing / "version_0"
        found[packing] = rows(folder), stored_turns(folder)
    metrics, turns = found["tree"]
    assert len(metrics) == 6
    for packing in ("trajectory", "none"):
        theirs, their_turns = found[packing]
        assert [turn["response_ids"] for turn in turns] == [turn["response_ids"] for turn in their_turns]
        for ours, other in zip(metrics, theirs, strict=True):
            for name in ("train/loss", "train/grad_norm", "train/entropy", "train/logprob_gap", "tokens/trained"):
                assert float(ours[name]) == pytest.approx(float(other[name]), rel=1e-4, abs=2e-6)
            num_saved = {rows_of: float(each["tokens/saved"]) for rows_of, each in (("ours", ours), ("other", other))}
            assert num_saved["ours"] > max(0.0, num_saved["other"])
            assert float(ours["flops/trained"]) < float(other["flops/trained"])
