"""Checkpoints beyond the bounds of a Trainer; whole resumes are in tests/e2e/test_resume.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lit_stepwise.errors import ConfigError
from lit_stepwise.rollout.resume import check_bounds


def checkpoint(started: int, processed: int, is_last_batch: bool) -> dict[str, Any]:
    epoch = {"current": {"started": started, "processed": processed}}
    return {
        "loops": {"fit_loop": {"epoch_progress": epoch, "epoch_loop.batch_progress": {"is_last_batch": is_last_batch}}}
    }


@pytest.mark.parametrize(
    ("saved", "finished"),
    [
        (checkpoint(6, 5, is_last_batch=True), 6),  # by the last optimizer step of the sixth iteration
        (checkpoint(6, 5, is_last_batch=False), 5),  # in the middle of it
        (checkpoint(6, 6, is_last_batch=True), 6),  # at its end
    ],
)
def test_a_checkpoint_beyond_the_last_iteration_is_refused_with_what_it_has_behind_it(
    saved: dict[str, Any], finished: int
) -> None:
    trainer: Any = SimpleNamespace(max_epochs=finished)
    check_bounds(trainer, saved)
    trainer.max_epochs = finished - 1
    with pytest.raises(
        ConfigError, match=f"max_epochs={finished - 1}, but the checkpoint has {finished} iterations behind it"
    ):
        check_bounds(trainer, saved)
