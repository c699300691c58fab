"""The callback writes what the command would, from one process and from two that share the weights."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_stepwise.export import ExportCallback

CALLBACK = "lit_stepwise.export.ExportCallback"


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def check_equal(left: Path, right: Path) -> None:
    found, expected = tensors_in(left), tensors_in(right)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def with_callback(countdown: dict[str, Any]) -> dict[str, Any]:
    """One iteration of two optimizer steps."""
    countdown["trainer"]["max_epochs"] = 1
    countdown["trainer"]["callbacks"].append({"class_path": CALLBACK})
    return countdown


def test_at_the_end_of_training_the_run_has_the_folder_that_the_command_makes_of_its_last_checkpoint(
    with_callback: dict[str, Any], main: Any, export: Any, tmp_path: Path, tiny_model: Path
) -> None:
    code, stderr = main("fit", with_callback)
    assert code == 0, stderr
    run = tmp_path / "runs" / "version_0"
    assert export(run / "checkpoints" / "last.ckpt", "out")[0] == 0
    check_equal(run / "model", tmp_path / "out")
    assert not torch.equal(tensors_in(run / "model")["model.norm.weight"], tensors_in(tiny_model)["model.norm.weight"])
    assert {path.name for path in (run / "model").iterdir()} == {path.name for path in Path("out").iterdir()}
    card = (run / "model" / "README.md").read_text()
    assert (
        card.replace("# model", "# out").replace('"model"', '"out"').replace("serve model", "serve out")
        == (tmp_path / "out" / "README.md").read_text()
    )
    with (run / "metrics.csv").open() as file:
        accuracy = [float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]][-1]
    assert f"| fraction of validation tasks solved | {accuracy:.4g} | 2 |" in card


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "taken"}, "taken exists and is not empty; name another folder, or remove it"),
        ({"adapter": "separate"}, "adapter=separate, but all weights were trained and there is no adapter; use merged"),
    ],
)
def test_what_could_not_be_written_is_refused_before_anything_is_played(
    settings: dict[str, Any], message: str, with_callback: dict[str, Any], main: Any, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with_callback["trainer"]["callbacks"][-1]["init_args"] = settings
    code, stderr = main("fit", with_callback)
    assert code == 1
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not list(tmp_path.glob("runs/**/*.jsonl"))


def test_other_stages_write_nothing_and_refuse_nothing(
    with_callback: dict[str, Any], main: Any, tmp_path: Path
) -> None:
    with_callback["trainer"]["callbacks"][-1]["init_args"] = {"adapter": "separate"}
    assert main("validate", with_callback)[0] == 0
    assert not list(tmp_path.glob("**/model.safetensors"))


# ---- two processes


@pytest.fixture(scope="module")
def sharded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two ranks left behind that each had half of every weight."""
    folder = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent.parent)
    words = [sys.executable, __file__, str(tiny_model), str(folder)]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(timeout=500)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the second process
            process.wait()
    assert process.returncode == 0, (folder / "log").read_text()
    return folder


@pytest.mark.slow
def test_a_folder_of_shards_a_single_file_and_the_live_module_give_the_very_same_tensors(
    sharded: Path, tiny_model: Path, export: Any, tmp_path: Path
) -> None:
    assert (sharded / "shards.ckpt" / "__1_0.distcp").is_file()
    assert (sharded / "whole.ckpt").is_file()
    for name in "shards", "whole":
        assert export(sharded / f"{name}.ckpt", tmp_path / name, "--model_path", tiny_model)[0] == 0
        check_equal(tmp_path / name, sharded / "model")
    before, after = tensors_in(tiny_model), tensors_in(sharded / "model")
    assert set(before) == set(after)
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_disk_that_is_full_is_an_error_of_all_ranks_and_none_waits(sharded: Path) -> None:
    for rank in range(2):
        said = json.loads((sharded / f"{rank}.json").read_text())
        assert said.startswith(f"{sharded}/full cannot be written: [Errno 28] No space left on device; name a folder")
    assert not list(sharded.glob("*full*"))


def train_on_two_ranks(model_path: str, folder: Path) -> None:
    """Lightning starts the second process, which does the same."""
    import lightning.pytorch as pl

    from lit_stepwise.algo import TurnReturn
    from lit_stepwise.engines import TransformersEngine
    from lit_stepwise.errors import ConfigError
    from lit_stepwise.export import folder as room
    from lit_stepwise.rollout import RolloutCallback
    from lit_stepwise.testing import Countdown, CountdownTasks
    from lit_stepwise.training import FSDP2Strategy, StepwiseModule, TaskDataModule
    from lit_stepwise.types import Limits

    limits = Limits(max_prompt_tokens=100, max_context_tokens=200, max_new_tokens=8, max_turns=3)
    rollout = RolloutCallback(TransformersEngine(), Countdown(), TurnReturn(), samples_per_task=4, limits=limits)
    callback = ExportCallback(str(folder / "model"))
    strategy = FSDP2Strategy()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, num_sanity_val_steps=0, logger=False,
        callbacks=[rollout, callback], default_root_dir=folder, enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    module = StepwiseModule(model_path, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    trainer.fit(module, datamodule=TaskDataModule(CountdownTasks(), train_files="5", tasks_per_iteration=2))
    trainer.save_checkpoint(folder / "shards.ckpt")
    strategy.save_distributed_checkpoint = strategy._save_distributed_checkpoint = False
    trainer.save_checkpoint(folder / "whole.ckpt")

    def write(tensors: Any, *_: Any) -> None:
        next(iter(tensors))
        raise OSError(28, "No space left on device")

    room.write_tensors = write
    callback._planned = replace(callback._planned, output=folder / "full")
    try:
        callback.on_train_end(trainer, module)
    except ConfigError as error:
        (folder / f"{trainer.global_rank}.json").write_text(json.dumps(str(error)))


if __name__ == "__main__":
    train_on_two_ranks(sys.argv[1], Path(sys.argv[2]))
