"""What cannot be exported is one line with the way out, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file

from lit_stepwise.testing import save_tiny_model

ROOT = Path(__file__).parent.parent.parent


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def without_a_policy(path: Path) -> None:
    torch.save({"global_step": 3, "state_dict": {"model.weight": torch.ones(2)}}, path)


def without_a_config(path: Path) -> None:
    (path.parent.parent / "config.yaml").unlink()


def with_a_broken_config(path: Path) -> None:
    (path.parent.parent / "config.yaml").write_text("model: [1,\n")


def with_base(model_path: str) -> Callable[[Path], None]:
    def name_it(path: Path) -> None:
        (path.parent.parent / "config.yaml").write_text(json.dumps({"model": {"model_path": model_path}}))

    return name_it


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no such checkpoint": (Path.unlink, "last.ckpt does not exist; give the path of one"),
    "a file cut off": (cut, "last.ckpt is cut off, or no checkpoint at all; give one that is whole"),
    "an empty file": (lambda path: path.write_bytes(b""), "last.ckpt is cut off, or no checkpoint at all"),
    "a text": (lambda path: path.write_text("hello\n"), "last.ckpt is cut off, or no checkpoint at all"),
    "another thing of torch": (lambda path: torch.save([1], path), "last.ckpt cannot be read (AttributeError: "),
    "no policy": (without_a_policy, "last.ckpt holds no policy: no weight in it is called policy.language_model"),
    "no config": (without_a_config, "is beside "),
    "a broken config": (with_a_broken_config, "config.yaml is no configuration of a run: "),
    "no such model": (with_base("/none"), "model_path='/none' is no folder here, and no known model has that name"),
    "no such name": (with_base("no/such"), "model_path='no/such' is no folder here, and no known model has that name"),
    "a folder without a model": (with_base("."), "model_path='.' holds no config.json; give the model that was"),
}


@pytest.fixture
def broken(tied_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint to be spoilt."""
    shutil.copytree(tied_run.folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "run" / "checkpoints" / "last.ckpt"


def check_refusal(code: int, said: str, message: str, folder: Path) -> None:
    assert code == 1
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in said
    assert [path.name for path in folder.iterdir()] == ["run"]


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_bad_input_is_one_line_and_nothing_is_written(
    spoil: Callable[[Path], Any], message: str, broken: Path, export: Any, tmp_path: Path
) -> None:
    spoil(broken)
    check_refusal(*export(broken, "new/out"), message, tmp_path)


def test_the_base_model_can_be_given_where_no_config_says_it(broken: Path, export: Any, tiny_model: Path) -> None:
    without_a_config(broken)
    assert export(broken, "out")[1].endswith("known; give --model_path\n")
    assert export(broken, "out", "--model_path", tiny_model)[0] == 0
    card = Path("out/README.md").read_text()
    assert "after 6 optimizer steps" in card
    assert "## Training" not in card
    assert "## Measured" not in card


def test_another_architecture_is_named_with_the_first_tensor_that_differs(
    broken: Path, export: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = save_tiny_model(tmp_path_factory.mktemp("other"), hidden_size=32)
    code, said = export(broken, "out", "--model_path", other)
    first = "the first lm_head.weight with shape (267, 64) there and (267, 32) here; give the model that was trained"
    check_refusal(code, said, first, tmp_path)
    deeper = save_tiny_model(tmp_path_factory.mktemp("deeper"), num_layers=3)
    check_refusal(*export(broken, "out", "--model_path", deeper), "here; give the model that was", tmp_path)


def test_a_model_without_a_tokenizer_is_refused(broken: Path, export: Any, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "base").mkdir()
    shutil.copy(tiny_model / "config.json", tmp_path / "run" / "base")
    code, said = export(broken, "out", "--model_path", tmp_path / "run" / "base")
    check_refusal(code, said, "base' holds no tokenizer; give the model that was trained", tmp_path)


def test_nothing_is_written_over_but_an_empty_folder_is_taken(broken: Path, export: Any) -> None:
    Path("out").mkdir()
    assert export(broken, "out")[0] == 0
    before = Path("out/README.md").stat().st_mtime_ns
    code, said = export(broken, "out")
    assert (code, "out exists and is not empty; name another folder, or remove it" in said) == (1, True)
    assert Path("out/README.md").stat().st_mtime_ns == before
    Path("file").touch()
    assert export(broken, "file")[0] == 1
    assert "file/below cannot be written: " in export(broken, "file/below")[1]


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device"), OSError(28, "No space left on device")]
)
def test_a_full_disk_leaves_nothing_behind(
    error: Exception, broken: Path, export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(values: Any, folder: Path, *_: Any) -> None:
        (folder / "model-0.safetensors").write_bytes(b"half of it")
        raise error

    monkeypatch.setattr("lit_stepwise.export.folder.write_tensors", write)
    code, said = export(broken, tmp_path / "out")
    check_refusal(code, said, f"{tmp_path}/out cannot be written: ", tmp_path)
    assert "No space left on device; name a folder with room for it" in said.replace(")", "")


KILLED = """
import sys, time
from lit_stepwise.export import folder
from lit_stepwise.export.command import export
write = folder.write_tensors
def write_and_wait(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(60)
folder.write_tensors = write_and_wait
export(sys.argv[1], sys.argv[2])
"""


def test_kill_9_leaves_no_folder_of_that_name_and_the_next_export_goes_through(
    broken: Path, export: Any, tmp_path: Path
) -> None:
    words = [sys.executable, "-c", KILLED, str(broken), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != b"written\n":
            assert line
        assert any(path.name.startswith(".out.partial-") for path in tmp_path.iterdir())
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert export(broken, tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


# ---- folders of shards


@pytest.fixture(params=["state_dict", "model"])
def shards(broken: Path, request: pytest.FixtureRequest) -> Path:
    """What strategies with sharded weights write, on one rank: ModelParallelStrategy, FSDPStrategy."""
    content = torch.load(broken, weights_only=True)
    broken.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is but one process
        state = {request.param: content.pop("state_dict"), "optimizer_0": {"state": {"x": torch.ones(3)}}}
        dcp.save(state, checkpoint_id=broken, no_dist=True)
    torch.save(content, broken / "meta.pt")
    return broken


def test_a_folder_of_shards_gives_the_same_weights_as_a_file(shards: Path, tied_run: Any, export: Any) -> None:
    assert export(shards, "out") == (
        0,
        f"wrote out: {tied_run.module.model_path} after 6 optimizer steps, in float32\n",
    )
    found = load_file("out/model.safetensors")
    expected = tied_run.weights()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (".metadata", Path.unlink, "last.ckpt has no .metadata, so it is half written, or no folder of shards at all"),
        (
            "meta.pt",
            Path.unlink,
            "last.ckpt has no meta.pt, so it is half written, or no folder of shards at all; give",
        ),
        (".metadata", cut, "last.ckpt cannot be read (UnpicklingError: pickle data was truncated); give one"),
        ("meta.pt", cut, "last.ckpt cannot be read (RuntimeError: "),
        ("__0_0.distcp", cut, " of its __0_0.distcp; give one that is whole"),
        ("__0_0.distcp", Path.unlink, "last.ckpt has only 0 bytes of the "),
    ],
)
def test_a_folder_of_shards_that_is_not_whole_is_refused(
    name: str, spoil: Callable[[Path], None], message: str, shards: Path, export: Any, tmp_path: Path
) -> None:
    spoil(shards / name)
    check_refusal(*export(shards, "out"), message, tmp_path)
