"""Which files a run's store is made of: its own, and of the runs it went on from those of before it did."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_stepwise.errors import StoreError
from lit_stepwise.store.schema import FORMAT, RUN_FILE

Kind = Literal["play", "learnt"]

_NAME = re.compile(r"(?P<kind>train|evaluate|learnt|play)(?:-(?:step)?(?P<first>\d+))?(?:-(?P<step>\d+))?\.parquet")
_MAGIC = b"PAR1"
"""What a whole Parquet file ends with."""


@dataclass(frozen=True, slots=True)
class Part:
    """The files of one run."""

    name: str
    """Of the run's folder."""
    folder: Path
    """Of the store."""
    files: dict[str, Path]
    """By name, in order."""
    before_step: int = sys.maxsize
    """Its successor went on from the checkpoint of this ``global_step``; boundless for the run itself."""


@dataclass(slots=True)
class StoredRun:
    """A run and those that it went on from, the run itself first."""

    folder: Path
    """Of the run: where ``config.yaml`` and ``metrics.csv`` lie, if there are any."""
    parts: list[Part]
    broken: list[Path] = field(default_factory=list)
    """Files that are not whole; they are passed over."""
    missing: Path | None = None
    """A store that it went on from and that is not there."""

    def files(self, kind: Kind) -> list[tuple[str, Path]]:
        """(run, file) of what counts, the latest of each name: what a resumed run played again replaces the former."""
        found: dict[str, tuple[str, Path]] = {}
        for part in self.parts:
            for name, path in part.files.items():
                if name.startswith("learnt") == (kind == "learnt"):
                    found.setdefault(name, (part.name, path))
        return [found[name] for name in sorted(found)]

    @property
    def num_bytes(self) -> int:
        """Size on the disk of the files that count."""
        return sum(path.stat().st_size for _, path in [*self.files("play"), *self.files("learnt")])


def find_run(path: str | Path) -> StoredRun:
    """The run at ``path``: its folder, a folder of several runs (the newest counts), or the store itself.

    Raises ``StoreError`` when there is none, or none that can be read.
    """
    store = _store_at(Path(path))
    parts, broken, missing = _chain(store)
    run = StoredRun(_run_folder(store), parts, broken, missing)
    if not run.files("play"):
        hint = f"; {broken[0].name} is not whole" if broken else ""
        raise StoreError(f"{store} holds no trajectories yet{hint}; wait for the first iteration, or name another run")
    return run


def _run_folder(store: Path) -> Path:
    return store.parent if store.name.startswith("trajectories") else store


def _name(store: Path) -> str:
    """Of the run's folder, and of the store where that may hold several."""
    run = _run_folder(store)
    return run.name if store in (run, run / "trajectories") else f"{run.name}/{store.name}"


def _store_at(path: Path) -> Path:
    if not path.exists():
        raise StoreError(f"{path} does not exist; give the folder of a run, such as runs/tiny/version_0")
    below = [each for pattern in ("*", "*/trajectories*", "*/*/trajectories*") for each in path.glob(pattern)]
    for found in (path.glob("trajectories*"), [path], below):
        stores = [each for each in found if _is_store(each)]
        if stores:
            return max(stores, key=lambda store: (_newest(store), str(store)))
    raise StoreError(f"{path} holds no run; give a folder with trajectories/, such as runs/tiny/version_0")


def _is_store(folder: Path) -> bool:
    return folder.is_dir() and (
        (folder / RUN_FILE).is_file() or folder.name == "trajectories" or (folder / "play.jsonl").is_file()
    )


def _newest(store: Path) -> float:
    return max((each.stat().st_mtime for each in store.iterdir()), default=store.stat().st_mtime)


def _chain(store: Path) -> tuple[list[Part], list[Path], Path | None]:
    """The parts from the run back to its first ancestor, files that are broken, and an ancestor that is missing."""
    parts: list[Part] = []
    broken: list[Path] = []
    iteration = step = sys.maxsize
    while True:
        said = _said(store)
        files = {path.name: path for path in sorted(store.glob("*.parquet")) if _counts(path.name, iteration, step)}
        broken += [path for path in files.values() if not _is_whole(path)]
        whole = {name: path for name, path in files.items() if path not in broken}
        parts.append(Part(_name(store.resolve()), store, whole, step))
        if not said.get("resumed_from"):
            return parts, broken, None
        iteration, step = min(said["iteration"], iteration), min(said["step"], step)
        ancestor = store / said["resumed_from"]
        if not ancestor.is_dir() or any(ancestor.samefile(part.folder) for part in parts):
            return parts, broken, ancestor
        store = ancestor


def _said(store: Path) -> dict[str, Any]:
    """What ``run.json`` says. Raises ``StoreError`` for a store of another format."""
    path = store / RUN_FILE
    if not path.is_file():
        if any(store.glob("*.jsonl")):
            raise StoreError(
                f"{store} was written by an older version, as JSON lines; read it with that version, or run it again"
            )
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        found = said["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error}); restore it, or name another run") from error
    if found != FORMAT:
        raise StoreError(
            f"{store} has format {found!r}, and this version reads format {FORMAT}; use the version that wrote it"
        )
    return dict(said)


def _counts(name: str, iteration: int, step: int) -> bool:
    """Whether a file is from before the successor went on: at the end of ``iteration`` or amid it, and at ``step``."""
    match = _NAME.fullmatch(name)
    if match is None:
        return False
    first, at = int(match["first"] or 0), int(match["step"] or 0)
    match match["kind"]:
        case "train":
            return first <= iteration
        case "learnt":
            return at < step
        case _:
            return first <= step


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        if path.stat().st_size < 12:
            return False
        file.seek(-4, 2)
        return file.read() == _MAGIC
