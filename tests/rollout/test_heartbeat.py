"""A line and the stacks when nothing moves."""

from __future__ import annotations

import time

import pytest

from lit_stepwise.rollout.heartbeat import Heartbeat

pytestmark = pytest.mark.clock


def said(capfd: pytest.CaptureFixture[str], heartbeat: Heartbeat, seconds: float) -> str:
    time.sleep(seconds)
    heartbeat.close()
    return capfd.readouterr().err


def test_silence_is_reported_once_with_the_phase_and_where_every_thread_stands(
    capfd: pytest.CaptureFixture[str],
) -> None:
    heartbeat = Heartbeat(0.1)
    heartbeat.beat("syncing weights")
    text = said(capfd, heartbeat, 0.5)
    assert text.count("no sign of life for 0 s while syncing weights (rollout.deadlines.heartbeat_seconds=0.1)") == 1
    assert "in said" in text  # this very function, which sleeps


def test_after_another_sign_of_life_silence_is_reported_again(capfd: pytest.CaptureFixture[str]) -> None:
    heartbeat = Heartbeat(0.1)
    heartbeat.beat("playing")
    time.sleep(0.3)
    heartbeat.beat("training")
    text = said(capfd, heartbeat, 0.3)
    assert (text.count("while playing"), text.count("while training")) == (1, 1)


def test_it_is_quiet_as_long_as_something_moves(capfd: pytest.CaptureFixture[str]) -> None:
    heartbeat, none = Heartbeat(1.0), Heartbeat(None)
    none.beat("playing")
    for _ in range(30):
        heartbeat.beat("playing")
        time.sleep(0.05)
    none.close()
    assert said(capfd, heartbeat, 0.0) == ""
