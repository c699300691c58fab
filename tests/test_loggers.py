"""Which loggers a run has, and what of it is where."""

from __future__ import annotations

import csv
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lit_stepwise.loggers import NoLogger, complete, prepare_loggers, with_folders

Curves = dict[str, dict[int, float]]
"""Values by name and optimizer step."""


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "")  # so that what a test sets is taken back
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)


# ---- the folder of a run


def test_a_logger_of_files_may_be_named_without_its_folder() -> None:
    given = ["fit", "--trainer.logger+=WandbLogger", "--trainer.logger+=TensorBoardLogger", "--trainer.max_epochs", "2"]
    folder = "--trainer.logger.save_dir=RUN_FOLDER"
    assert with_folders(given) == [*given[:3], folder, *given[3:]]
    assert with_folders(["--trainer.logger", "CSVLogger"]) == ["--trainer.logger", "CSVLogger", folder]
    assert with_folders(["--trainer.logger", "false"]) == ["--trainer.logger", "false"]


def wanted(kind: str, **settings: Any) -> Any:
    """A logger as it was parsed."""
    return SimpleNamespace(class_path=f"lightning.pytorch.loggers.{kind}", init_args=SimpleNamespace(**settings))


def test_what_was_given_no_folder_writes_below_that_of_all_runs() -> None:
    ours = wanted("TensorBoardLogger", save_dir="RUN_FOLDER", name="lightning_logs")
    named = wanted("TensorBoardLogger", save_dir="RUN_FOLDER", name="mine")
    theirs = wanted("CSVLogger", save_dir="logs", name="lightning_logs")
    online = wanted("WandbLogger", save_dir=".")
    prepare_loggers([ours, named, theirs, online], "runs", ["--trainer.logger.offline", "false"], [])
    found = [vars(each.init_args) for each in (ours, named, theirs, online)]
    assert [each.get("name") for each in found] == ["", "mine", "lightning_logs", None]
    assert [each["save_dir"] for each in found] == ["runs", "runs", "logs", "runs"]


def test_the_first_logger_names_one_folder_for_all_files(tmp_path: Path) -> None:
    (tmp_path / "version_4").mkdir()
    root = str(tmp_path)
    board = TensorBoardLogger(root, name="")
    for given in (None, True, board, [WandbLogger(offline=True), board], WandbLogger(offline=True), False):
        first, *others = complete(given, root)
        assert isinstance(first, CSVLogger)
        assert (first.log_dir, isinstance(first, NoLogger)) == (str(tmp_path / "version_5"), given is False)
        assert others == ([] if isinstance(given, bool | None) else given if isinstance(given, list) else [given])
    mine = CSVLogger(root, name="mine", version=7)
    assert complete([board, mine], root) == [mine, board]


# ---- W&B without a key


def test_without_a_key_wandb_is_offline_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    prepare_loggers(wanted("WandbLogger", save_dir="mine"), "runs", ["fit"], ["trainer: {max_epochs: 2}", ""])
    assert os.environ["WANDB_MODE"] == "offline"
    (said,) = caplog.messages
    assert "no key for W&B" in said
    assert "wandb sync mine/wandb/offline-run-*" in said


@pytest.mark.parametrize(
    ("words", "page"),
    [
        (["--trainer.logger.offline=false"], ""),
        (["--trainer.logger.init_args.mode", "online"], ""),
        ([], "trainer: {logger: {class_path: WandbLogger, init_args: {offline: false}}}"),
        ([], "trainer: {logger: [{class_path: WandbLogger, dict_kwargs: {mode: online}}]}"),
    ],
)
def test_what_the_user_says_of_it_wins(words: list[str], page: str) -> None:
    prepare_loggers([wanted("WandbLogger", save_dir=".")], "runs", words, [page])
    assert "WANDB_MODE" not in os.environ


def test_with_a_key_it_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for give in (
        lambda: (tmp_path / ".netrc").write_text(f"machine api.example login user password {'0f' * 20}\n"),
        lambda: monkeypatch.setenv("WANDB_API_KEY", "0f" * 20),
    ):
        give()
        prepare_loggers(wanted("WandbLogger", save_dir="."), "runs", [], [])
        assert "WANDB_MODE" not in os.environ
        (tmp_path / ".netrc").unlink(missing_ok=True)


# ---- real loggers of a real run


def of_csv(path: Path) -> Curves:
    curves: Curves = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name != "step":
                    curves.setdefault(name, {})[int(row["step"])] = float(value)
    return curves


def of_tensorboard(folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        name: {each.step: each.value for each in events.Scalars(name)}
        for name in events.Tags()["scalars"]
        if name != "hp_metric"  # Lightning's own, for a table of settings
    }


def records(path: Path) -> Iterator[Any]:
    """What W&B keeps of an offline run: a LevelDB log of protocol buffers, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def of_wandb(found: list[Any]) -> Curves:
    curves: Curves = {}
    for record in found:
        items = {each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in record.history.item}
        for name, value in items.items():
            if not name.startswith(("_", "trainer/")):
                curves.setdefault(name, {})[items["trainer/global_step"]] = value
    return curves


@pytest.mark.slow
def test_all_loggers_have_the_same_curves_over_optimizer_steps(
    countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    loggers = (
        "--trainer.logger+=TensorBoardLogger",
        "--trainer.logger+=WandbLogger",
        "--trainer.logger.log_model=true",
    )
    done = run("fit", countdown, *loggers)
    assert done.returncode == 0, done.stderr
    assert "no key for W&B" in done.stderr
    folder = tmp_path / "runs" / "version_0"
    here = {path.name.partition(".1")[0] for path in folder.iterdir()}
    assert here >= {"checkpoints", "config.yaml", "trajectories", "metrics.csv", "events.out.tfevents"}
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["version_0", "wandb"]

    (path,) = tmp_path.glob("runs/wandb/offline-run-*/*.wandb")
    kept = list(records(path))
    curves, board, wandb = of_csv(folder / "metrics.csv"), of_tensorboard(folder), of_wandb(kept)
    assert curves.keys() == board.keys() == wandb.keys()
    for name, values in curves.items():
        if name != "seconds/save":  # twice at a step: the newest checkpoint, and last.ckpt
            assert wandb[name] == pytest.approx(values), name
            assert board[name] == pytest.approx(values, rel=1e-6), name
    assert list(curves["train/loss"]) == [0, 1, 2, 3, 4, 5]
    assert list(curves["rollout/reward"]) == [0, 2, 4]  # two optimizer steps an iteration
    assert list(curves["val/accuracy"]) == [0, 2, 4, 6]
    settings = {each.key: json.loads(each.value_json) for record in kept for each in record.config.update}
    assert settings["rollout"]["samples_per_task"] == 4
    assert {record.artifact.type for record in kept if record.artifact.name} == {"model"}


@pytest.mark.slow
def test_without_a_logger_a_run_has_a_folder_of_its_own_and_no_metrics(
    countdown: dict[str, Any], main: Any, tmp_path: Path
) -> None:
    for number in range(2):
        code, stderr = main("fit", countdown, "--trainer.logger", "false", "--trainer.max_epochs", "1")
        assert code == 0, stderr
        here = {path.name for path in (tmp_path / "runs" / f"version_{number}").iterdir()}
        assert here == {"checkpoints", "config.yaml", "trajectories"}
