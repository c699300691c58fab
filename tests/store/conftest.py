"""Stores without a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from by_hand import GREEDY, learn, train

from lit_stepwise.store.settings import Storage
from lit_stepwise.store.write import StoredPhase, TrajectoryStore

MakeStore = Callable[..., TrajectoryStore]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """A store in ``runs/version_<number>``."""

    def make(number: int = 0, settings: Storage = Storage()) -> TrajectoryStore:  # noqa: B008
        folder = tmp_path / "runs" / f"version_{number}" / "trajectories"
        return TrajectoryStore(folder, settings, lambda ids: f"prompt of {len(ids)}")

    return make


@pytest.fixture
def run(make_store: MakeStore) -> Path:
    """A run of two iterations and an evaluation, with a metrics.csv."""
    store = make_store()
    store.write(StoredPhase("evaluate", 12, [GREEDY]))
    train(store, 3)
    learn(store, 3, 11, [-0.5, -0.75])
    learn(store, 3, 12, [-4.5, -4.25], pass_index=1)
    train(store, 4)
    folder = store.folder.parent
    (folder / "metrics.csv").write_text("epoch,step,train/loss,val/accuracy\n3,11,0.25,\n3,11,,0.5\n4,12,0.75,\n")
    return folder
