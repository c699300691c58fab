"""``--ckpt_path last`` is the newest checkpoint that is whole, wherever it is and whatever it is called."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import save

from lit_stepwise.checkpoints.finding import find_checkpoint, flaw_of
from lit_stepwise.errors import ConfigError

REST: dict[str, Any] = {"global_step": 3, "lr_schedulers": []}


def file(path: Path, time: float, **rest: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"w": torch.ones(1000)}, **REST, **rest}, path)
    os.utime(path, (time, time))
    return path


def shards(path: Path, time: float) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: one process is what is wanted
        save({"state_dict": {"w": torch.ones(1000)}}, checkpoint_id=path, no_dist=True)
    torch.save(REST, path / "meta.pt")
    os.utime(path / "meta.pt", (time, time))
    return path


def cut(path: Path) -> Path:
    """The time stays."""
    before = path.stat().st_mtime
    os.truncate(path, path.stat().st_size - 100)
    os.utime(path, (before, before))
    return path


def last(folder: Path, to_train: bool = True) -> Path | None:
    return find_checkpoint("last", [folder], to_train)


def test_the_newest_of_all_runs_is_found_and_of_a_link_and_its_target_the_link(tmp_path: Path) -> None:
    file(tmp_path / "version_7" / "last.ckpt", 100)
    newest = file(tmp_path / "version_1" / "checkpoints" / "step=3.ckpt", 300)
    file(tmp_path / "version_8" / "last.ckpt", 200)
    assert last(tmp_path) == newest
    link = newest.with_name("last.ckpt")
    link.symlink_to("step=3.ckpt")
    assert last(tmp_path) == link


def test_a_folder_is_as_old_as_what_was_written_last_and_old_ones_in_passing_count(tmp_path: Path) -> None:
    file(tmp_path / "a.ckpt", 200)
    newest = shards(tmp_path / "last.ckpt.old", 300)
    shards(tmp_path / "c.ckpt", 100)
    assert last(tmp_path) == newest


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: cut(file(folder / "b.ckpt", 300)), r"b.ckpt is cut off, or no checkpoint at all, and is pas"),
        (lambda folder: file(folder / "b.ckpt.part", 300), r"b.ckpt.part was still being written when its run ended"),
        (lambda folder: (shards(folder / "b.ckpt.part", 300) / ".metadata").unlink(), r"b.ckpt.part was still being"),
        (lambda folder: (shards(folder / "b.ckpt", 300) / ".metadata").unlink(), r"b.ckpt has no .metadata, so it is"),
        (lambda folder: cut(shards(folder / "b.ckpt", 300) / "meta.pt"), r"b.ckpt cannot be read \(RuntimeError"),
        (lambda folder: cut(shards(folder / "b.ckpt", 300) / "__0_0.distcp"), r"has only .* kB of the .* kB of its _"),
        (lambda folder: (shards(folder / "b.ckpt", 300) / "__0_0.distcp").unlink(), r"b.ckpt has only 0 bytes of the"),
        (lambda folder: torch.save({"global_step": 1}, folder / "b.ckpt"), r"b.ckpt holds weights alone, so that"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_passed_over_with_a_line_that_says_why(spoil: Any, said: str, tmp_path: Path) -> None:
    whole = file(tmp_path / "a.ckpt", 200)
    spoil(tmp_path)
    with pytest.warns(UserWarning, match=said):
        assert last(tmp_path) == whole


def test_a_link_to_what_is_gone_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").symlink_to("step=3.ckpt")
    assert last(tmp_path) is None


def test_where_there_was_never_a_whole_one_it_is_a_fresh_start(tmp_path: Path) -> None:
    file(tmp_path / "a.ckpt.part", 100)
    with pytest.warns(UserWarning, match="a.ckpt.part was still being written"):
        assert last(tmp_path) is None


def test_a_run_whose_only_checkpoint_is_damaged_is_not_begun_anew_unasked(tmp_path: Path) -> None:
    cut(file(tmp_path / "a.ckpt", 100))
    with (
        pytest.warns(UserWarning, match="is passed over"),
        pytest.raises(ConfigError, match=r"no checkpoint to go on from, and .*a.ckpt is cut off"),
    ):
        last(tmp_path)


def test_weights_alone_are_enough_to_play(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"global_step": 1}, path)
    assert last(tmp_path, to_train=False) == path


def test_a_path_is_taken_or_refused_with_what_is_wrong(tmp_path: Path) -> None:
    assert find_checkpoint(None, [tmp_path], to_train=True) is None
    path = file(tmp_path / "a.ckpt", 100)
    assert find_checkpoint(str(path), [], to_train=True) == path
    with pytest.raises(ConfigError, match=r"ckpt_path='.*b.ckpt' does not exist; give a checkpoint, or 'last'"):
        find_checkpoint(tmp_path / "b.ckpt", [], to_train=True)
    with pytest.raises(ConfigError, match=r"ckpt_path='.*' has no .metadata, so it is half written, or no folder of"):
        find_checkpoint(tmp_path, [], to_train=True)
    assert flaw_of(cut(path)) == "is cut off, or no checkpoint at all"
