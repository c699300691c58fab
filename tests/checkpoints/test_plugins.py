"""A checkpoint is under its name when it is whole, and not before; what goes wrong leaves those before it alone."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_stepwise.checkpoints import AsyncCheckpointIO, AtomicCheckpointIO
from lit_stepwise.checkpoints.files import part_of, put_in_place, readable, remove
from lit_stepwise.errors import CheckpointError, ConfigError

FIRST, SECOND = {"state_dict": {"w": torch.full((30_000,), 2.0)}}, {"state_dict": {"w": torch.full((30_000,), 3.0)}}


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can be larger, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def weight(path: Path) -> float:
    return float(torch.load(path, weights_only=True)["state_dict"]["w"].mean())


class Gate:
    """Is pickled when it is opened."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.reached = threading.Event()

    def __reduce__(self) -> Any:
        self.reached.set()
        assert self.event.wait(60)
        return (OrderedDict, ())


@pytest.mark.parametrize("plugin", [AtomicCheckpointIO, AsyncCheckpointIO])
def test_a_file_takes_the_place_of_the_one_before(plugin: type[AtomicCheckpointIO], tmp_path: Path) -> None:
    io, path = plugin(), tmp_path / "new" / "last.ckpt"
    for content in (FIRST, SECOND):
        io.save_checkpoint(content, path)
    io.teardown()
    assert weight(path) == 3.0
    assert float(io.load_checkpoint(path)["state_dict"]["w"][-1]) == 3.0
    assert [each.name for each in path.parent.iterdir()] == ["last.ckpt"]
    io.remove_checkpoint(path)
    io.teardown()
    assert list(path.parent.iterdir()) == []


def test_where_there_is_no_room_the_line_names_path_and_size_and_the_file_before_stays(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(FIRST, path)
    expected = rf"the checkpoint {path} of 120.0 kB could not be written, with .* free there: File too large; those"
    with room_for(50_000), pytest.raises(CheckpointError, match=expected):
        io.save_checkpoint(SECOND, path)
    assert weight(path) == 2.0
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder of shards, and trainer.strategy reads single files; use"):
        AtomicCheckpointIO().load_checkpoint(tmp_path)


def test_what_is_written_meanwhile_is_what_it_was_when_it_was_saved(tmp_path: Path) -> None:
    io, gate, trained = AsyncCheckpointIO(), Gate(), torch.tensor([5.0])
    io.save_checkpoint({"state_dict": {"w": trained}, "gate": gate}, tmp_path / "a.ckpt")
    assert gate.reached.wait(60)
    trained += 1
    assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt.part"]
    gate.event.set()
    io.teardown()
    assert weight(tmp_path / "a.ckpt") == 5.0


def test_none_is_deleted_before_its_successor_is_whole(tmp_path: Path) -> None:
    io, gate = AsyncCheckpointIO(), Gate()
    io.save_checkpoint(FIRST, tmp_path / "a.ckpt")
    io.save_checkpoint({**SECOND, "gate": gate}, tmp_path / "b.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    assert gate.reached.wait(60)
    assert weight(tmp_path / "a.ckpt") == 2.0
    gate.event.set()
    io.teardown()
    assert [each.name for each in tmp_path.iterdir()] == ["b.ckpt"]


@pytest.mark.parametrize("then", ["save", "end"])
def test_a_write_that_fails_is_raised_by_what_comes_next_and_nothing_is_deleted(then: str, tmp_path: Path) -> None:
    io = AsyncCheckpointIO()
    io.save_checkpoint(FIRST, tmp_path / "a.ckpt")
    io.teardown()
    gate = Gate()
    with room_for(50_000):
        io.save_checkpoint({**SECOND, "gate": gate}, tmp_path / "b.ckpt")
        for _ in range(2):
            io.remove_checkpoint(tmp_path / "a.ckpt")
        gate.event.set()
        with pytest.raises(CheckpointError, match=r"b.ckpt of 120.0 kB could not be written"):
            io.save_checkpoint(SECOND, tmp_path / "c.ckpt") if then == "save" else io.teardown()
    io.teardown()
    assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]


def folder_with(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text(name)
    return path


def test_a_folder_takes_the_place_of_a_folder_a_file_or_a_link(tmp_path: Path) -> None:
    folder_with(tmp_path / "a.ckpt", "old", "older")
    (tmp_path / "b.ckpt").write_text("a file")
    (tmp_path / "c.ckpt").symlink_to("a.ckpt")
    for name in "abcd":
        path = tmp_path / f"{name}.ckpt"
        put_in_place(folder_with(part_of(path), f"new {name}"), path)
    found = {path.name: [each.name for each in path.iterdir()] for path in tmp_path.iterdir()}
    assert found == {f"{name}.ckpt": [f"new {name}"] for name in "abcd"}


def test_while_a_folder_takes_a_place_one_of_them_is_whole_under_a_name_that_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder_with(tmp_path / "last.ckpt", "old")
    part = folder_with(part_of(path), "new")
    seen: list[list[str]] = []
    for method in ("rename", "replace"):
        whole = getattr(Path, method)

        def look(self: Path, target: Path, whole: Any = whole) -> Path:
            seen.append(sorted(each.name for each in tmp_path.iterdir()))
            done: Path = whole(self, target)
            return done

        monkeypatch.setattr(Path, method, look)
    put_in_place(part, path)
    assert seen == [
        ["last.ckpt", "last.ckpt.part"],
        ["last.ckpt.old", "last.ckpt.part"],
        ["last.ckpt", "last.ckpt.old"],
    ]
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_kill_leaves_of_a_folder_being_deleted_is_named_as_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder_with(tmp_path / "step=5.ckpt", "one", "two")
    monkeypatch.setattr("shutil.rmtree", lambda doomed: (doomed / "one").unlink())
    remove(path)
    assert [each.name for each in tmp_path.iterdir()] == ["step=5.ckpt.part"]


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 bytes"), (999, "999 bytes"), (13_120_000, "13.1 MB"), (9.1e10, "91.0 GB")]
)
def test_sizes_are_said_for_people(size: int, said: str) -> None:
    assert readable(size) == said
