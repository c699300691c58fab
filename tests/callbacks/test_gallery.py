"""The whole gallery in one run through the console script, from another working directory: alone, killed and resumed,
on two ranks, and ahead of training."""

from __future__ import annotations

import ast
import csv
import json
import re
import shutil
from collections.abc import Callable
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from callbacks.curriculum import Curriculum
from callbacks.prompt_warmup import PromptWarmup
from lit_stepwise.store.read import open_run, rows_of
from lit_stepwise.testing import CountdownTasks
from lit_stepwise.training import TaskDataModule
from lit_stepwise.types import Deal

ROOT = Path(__file__).parent.parent.parent
GALLERY = sorted((ROOT / "callbacks").glob("*.py"))
GUIDE = (ROOT / "docs" / "callbacks.md").read_text()
SETTINGS: dict[str, dict[str, Any]] = {
    "curriculum": {"easy_weight": 0.01, "hard_weight": 0.02, "patience": 1},
    "prompt_warmup": {"first_share": 0.5, "num_iterations": 2},
    "turn_budget": {"first_max_turns": 1, "num_iterations": 2},
    "export_every": {"every_n_steps": 5, "keep": 1},
    "logprob_gap_guard": {"max_gap": -1, "patience": 4, "action": "lower_lr", "max_lowerings": 9},
    "kl_early_stop": {"max_kl": 9.0},
    "sample_printer": {"every_n_iterations": 2},
}
KILL = """
import os, signal
from lightning.pytorch import Callback

class KillBefore(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def yaml_at_the_top_of(path: Path) -> Any:
    return yaml.safe_load((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n", 1)[1])


def whole_gallery(config: dict[str, Any], folder: Path, *left_out: str) -> dict[str, Any]:
    """Twelve tasks, four an iteration, ten optimizer steps; three of the prompts are a digit longer."""
    shutil.copytree(ROOT / "callbacks", folder / "callbacks", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "callbacks" / "longest.py").write_text(re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)[0])
    config["data"] |= {"train_files": "12", "tasks_per_iteration": 4}
    config["trainer"]["max_epochs"] = 5
    for path in GALLERY:
        if path.stem not in left_out:
            (callback,) = yaml_at_the_top_of(path)["trainer"]["callbacks"]
            callback["init_args"] |= SETTINGS.get(path.stem, {})
            config["trainer"]["callbacks"].append(callback)
    config["trainer"]["callbacks"].append({"class_path": "callbacks.longest.LongestTurn"})
    return config


class Finished:
    """What a run left behind."""

    def __init__(self, done: Any, folder: Path) -> None:
        assert done.returncode == 0, done.stderr
        self.stdout: str = done.stdout
        self.root = folder
        self.folder = max(folder.glob("runs/version_*"), key=lambda path: path.stat().st_mtime)
        with (self.folder / "metrics.csv").open() as file:
            steps: dict[str, dict[str, float]] = {}
            for row in csv.DictReader(file):
                values = {name: float(value) for name, value in row.items() if value and name != "step"}
                steps.setdefault(row["step"], {}).update(values)
        self.metrics = [steps[step] for step in sorted(steps, key=int)]

    def turns(self, iteration: int) -> list[dict[str, Any]]:
        query = "select * from turns where stage = 'train' and iteration = ? order by group_id, sample, turn"
        return rows_of(open_run(self.folder), query, iteration)

    def trajectories(self, iteration: int) -> list[dict[str, Any]]:
        query = "select * from trajectories where stage = 'train' and iteration = ? order by group_id, sample"
        return rows_of(open_run(self.folder), query, iteration)

    def tasks(self, iteration: int) -> list[str]:
        return [each["task_id"] for each in self.trajectories(iteration) if each["sample"] == 0]

    def num_turns(self, iteration: int) -> int:
        return max(each["num_turns"] for each in self.trajectories(iteration))

    @property
    def checkpoint(self) -> Any:
        return torch.load(self.folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def alone(new_countdown: Callable[[], Any], run_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("alone")
    config = whole_gallery(new_countdown(), folder)
    (wandb,) = (yaml_at_the_top_of(path)["trainer"]["logger"] for path in GALLERY if path.stem == "trajectory_table")
    wandb["init_args"]["save_dir"] = "logs"
    plain = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": ""}}
    config["trainer"]["logger"] = [plain, wandb]
    return Finished(run_in(folder, "fit", config), folder)


def test_the_guide_and_the_readme_show_the_callback_that_runs_here_and_list_the_whole_gallery() -> None:
    (example, curriculum) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert example in (ROOT / "README.md").read_text()
    assert len(example.splitlines()) <= 20
    names: dict[str, Any] = {}
    exec(example + curriculum, names)
    deal = Deal(5, [], [299, 300, 301], [0.5, 0.25, 1.0], 3)
    names["ShortFirst"]().on_deal(deal)
    assert deal.weights == [0.5, 0.25, 0.0]
    for text in (GUIDE, (ROOT / "callbacks" / "README.md").read_text()):
        assert re.findall(r"^\| `(\w+)\.py`", text, re.MULTILINE) == re.findall(r"^\| `(\w+)\.py`", GUIDE, re.MULTILINE)
        assert sorted(re.findall(r"^\| `(\w+\.py)`", text, re.MULTILINE)) == [path.name for path in GALLERY]


def test_a_callback_of_twenty_lines_logs_what_it_heard(alone: Finished) -> None:
    assert [alone.metrics[2 * i]["rollout/longest"] for i in range(5)] == [alone.num_turns(i) for i in range(5)]


def test_tables_of_picked_trajectories_are_in_wandb(alone: Finished) -> None:
    paths = alone.root.glob("logs/wandb/offline-run-*/files/media/table/trajectories_*.json")
    tables = sorted((json.loads(path.read_text()) for path in paths), key=lambda table: table["data"][0][0])
    assert [table["data"][0][0] for table in tables] == [0, 1, 2, 3, 4]
    for iteration, table in enumerate(tables):
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        assert [row["pick"] for row in rows if row["turn"] == 0] == ["best", "worst", "random", "random"]
        stored = {(each["task_id"], each["sample"], each["turn"]): each for each in alone.turns(iteration)}
        rewards = [each["reward"] for each in alone.trajectories(iteration)]
        for pick, reward in (("best", max(rewards)), ("worst", min(rewards))):
            mine = [row for row in rows if row["pick"] == pick]
            assert sum(row["reward_goal"] + row["reward_shorter"] for row in mine) == reward
        for row in rows:
            turn = stored[row["task"], row["sample"], row["turn"]]
            assert (row["response"], row["observation"]) == (turn["response"], turn["observation"])
            assert row["ended"] == turn["stop_reason"]
            assert row["advantage"] == pytest.approx(turn["advantage"])


def test_pass_at_k_is_of_the_groups_that_were_played(alone: Finished) -> None:
    for iteration in range(5):
        solved: dict[int, int] = {}
        for each in alone.trajectories(iteration):
            solved[each["group_id"]] = solved.get(each["group_id"], 0) + each["success"]
        row = alone.metrics[2 * iteration]
        for k in (1, 2, 4):
            expected = sum(1 - comb(4 - c, k) / comb(4, k) for c in solved.values()) / 4
            assert row[f"rollout/pass_at_{k}"] == pytest.approx(expected)
        assert "rollout/pass_at_1" not in alone.metrics[2 * iteration + 1]
    assert 0 < alone.metrics[0]["rollout/pass_at_1"] < alone.metrics[0]["rollout/pass_at_4"]


def test_the_printer_shows_model_and_world_in_the_iterations_asked_for(alone: Finished) -> None:
    shown = [line.split(",")[0] for line in alone.stdout.splitlines() if line.startswith("iteration")]
    assert shown == [f"iteration {iteration}" for iteration in (0, 0, 2, 2, 4, 4)]
    assert "\n    world  8 is too long\n    reward " in alone.stdout


def test_turns_and_prompts_grow_and_tasks_that_teach_nothing_are_played_less_as_the_callbacks_said(
    alone: Finished,
) -> None:
    assert [alone.num_turns(i) for i in range(3)] == [1, 2, 3]
    assert [alone.metrics[2 * i]["rollout/max_turns"] for i in range(5)] == [1, 2, 3, 3, 3]
    data = TaskDataModule(CountdownTasks(), train_files="12", val_files="3", tasks_per_iteration=4)
    data.setup("fit")
    curriculum, warmup = Curriculum(**SETTINGS["curriculum"]), PromptWarmup(**SETTINGS["prompt_warmup"])
    moved = 0
    for iteration in range(5):
        deal = Deal(iteration, data.training_tasks, [20] * 9 + [21] * 3, [1.0] * 12, 3)
        curriculum.on_deal(deal)
        warmup.on_deal(deal)
        assert [task.task_id for task in data.tasks_for(iteration, deal.weights)] == alone.tasks(iteration)
        moved += [task.task_id for task in data.tasks_for(iteration)] != alone.tasks(iteration)
        assert iteration > 1 or not {"goal-10", "goal-11", "goal-12"} & set(alone.tasks(iteration))
        curriculum.on_selection(
            [SimpleNamespace(**each, group=each["group_id"], failed=False) for each in alone.trajectories(iteration)]
        )
        streaks = curriculum.streaks.values()
        row = alone.metrics[2 * iteration]
        assert row["rollout/tasks_easy"] == sum(streak > 0 for streak in streaks)
        assert row["rollout/tasks_hard"] == sum(streak < 0 for streak in streaks)
    assert moved >= 3
    assert alone.checkpoint["callbacks"]["Curriculum"] == curriculum.state_dict()


def test_the_guard_lowers_the_learning_rate_and_lets_the_run_go_on(alone: Finished) -> None:
    factors = [row["train/lr_factor"] for row in alone.metrics if "train/lr_factor" in row]
    assert factors == [1.0] * 4 + [0.5] * 4 + [0.25] * 2
    assert [row["train/lr"] for row in alone.metrics if "train/lr" in row] == pytest.approx([1e-3] * 10)


def test_the_newest_export_is_there_alone_and_is_the_policy_of_its_step(alone: Finished) -> None:
    (folder,) = (alone.folder / "exports").iterdir()
    assert folder.name == "step-000010"
    exported = load_file(folder / "model.safetensors")
    last = alone.checkpoint["state_dict"]
    assert alone.checkpoint["global_step"] == 10
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        (trained,) = [tensor for key, tensor in last.items() if key.endswith(name)]
        assert torch.equal(exported[name], trained)


@pytest.mark.slow
def test_a_run_with_the_whole_gallery_killed_in_the_middle_of_an_iteration_ends_like_the_one_left_alone(
    alone: Finished, countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    (tmp_path / "kill_before.py").write_text(KILL)
    config = whole_gallery(countdown, tmp_path, "trajectory_table")
    callbacks = config["trainer"]["callbacks"]
    config["trainer"]["callbacks"] = [*callbacks, {"class_path": "kill_before.KillBefore"}]
    assert run("fit", config).returncode == -9
    config["trainer"]["callbacks"] = callbacks
    resumed = Finished(run("fit", config, "--ckpt_path", "last"), tmp_path)
    assert not (resumed.folder / "trajectories" / "train-000002.parquet").exists()  # its samples were stored
    for iteration in (3, 4):
        assert resumed.tasks(iteration) == alone.tasks(iteration)
        assert resumed.num_turns(iteration) == alone.num_turns(iteration)
    ours, theirs = resumed.checkpoint, alone.checkpoint
    assert all(torch.equal(ours["state_dict"][name], tensor) for name, tensor in theirs["state_dict"].items())
    for name in ("Curriculum", "LogprobGapGuard", "KLEarlyStop"):
        assert ours["callbacks"][name] == theirs["callbacks"][name]
    assert [path.name for path in tmp_path.glob("runs/*/exports/*")] == ["step-000010"]  # that of before is gone


@pytest.mark.slow
def test_on_two_ranks_that_share_the_weights_the_whole_gallery_does_what_it_does_on_one(
    alone: Finished, countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    config = whole_gallery(countdown, tmp_path, "trajectory_table")
    config["trainer"] |= {"devices": 2, "strategy": "fsdp2", "max_epochs": 3}
    both = Finished(run("fit", config), tmp_path)
    for iteration in range(3):
        assert both.tasks(iteration) == alone.tasks(iteration)
        ours, theirs = both.metrics[2 * iteration], alone.metrics[2 * iteration]
        for name in ("pass_at_1", "pass_at_2", "pass_at_4", "tasks_easy", "tasks_hard", "max_turns", "longest"):
            assert ours[f"rollout/{name}"] == pytest.approx(theirs[f"rollout/{name}"])
    shown = [line.split(",")[0] for line in both.stdout.splitlines() if line.startswith("iteration")]
    assert shown == [f"iteration {iteration}" for iteration in (0, 0, 2, 2)]
    assert [path.name for path in both.folder.glob("exports/*")] == ["step-000005"]


@pytest.mark.slow
def test_ahead_of_training_two_ranks_deal_out_the_same_tasks_and_turns(
    countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    config = whole_gallery(countdown, tmp_path, "trajectory_table")
    config["rollout"] |= {"staleness": 1, "deterministic": False}
    config["trainer"] |= {"devices": 2, "strategy": "ddp", "max_epochs": 4}
    done = Finished(run("fit", config), tmp_path)
    for iteration in range(4):
        played = [(each["group_id"], each["sample"]) for each in done.trajectories(iteration)]
        assert played == [(group, sample) for group in range(4) for sample in range(4)]
        for group in range(4):
            assert len({each["task_id"] for each in done.trajectories(iteration) if each["group_id"] == group}) == 1
    assert [done.num_turns(iteration) for iteration in range(2)] == [1, 2]
    assert [done.metrics[2 * i]["rollout/max_turns"] for i in range(4)] == [1, 2, 3, 3]
    assert not {"goal-10", "goal-11", "goal-12"} & {*done.tasks(0), *done.tasks(1)}
