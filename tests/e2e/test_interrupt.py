"""Ctrl-C, once and twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.clock]

GAME = """
import signal, subprocess, sys, time
from dataclasses import dataclass
from lit_stepwise.testing import Countdown


@dataclass
class SlowGame(Countdown):
    closing_seconds: float = 0.0

    def start(self, task, max_turns):
        episode = super().start(task, max_turns)
        answer = episode.step
        episode.step = lambda response: print("in play", flush=True) or time.sleep(0.5) or answer(response)
        return episode

    def close(self):
        # a kernel may give the signal to any thread; here never to the one that Python's handlers run in
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        print("closing", flush=True)
        time.sleep(self.closing_seconds)
"""


Start = Callable[[float, int], "subprocess.Popen[str]"]


@pytest.fixture
def start(countdown: dict[str, Any], tmp_path: Path) -> Iterator[Start]:
    started = []

    def start(closing_seconds: float, staleness: int) -> subprocess.Popen[str]:
        started.append(start_fit(tmp_path, countdown, closing_seconds, staleness))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def start_fit(folder: Path, config: dict[str, Any], closing_seconds: float, staleness: int) -> subprocess.Popen[str]:
    (folder / "slow_game.py").write_text(GAME)
    config["rollout"] |= {"staleness": staleness, "deterministic": staleness == 0}
    config["rollout"]["environment"] = {
        "class_path": "slow_game.SlowGame",
        "init_args": {"closing_seconds": closing_seconds},
    }
    config["trainer"]["num_sanity_val_steps"] = 0
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    script = Path(sys.executable).with_name("lit-stepwise")
    return subprocess.Popen(
        [str(script), "fit", "--config", "config.yaml"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if word in line:
            return said
    raise AssertionError(said)


@pytest.mark.parametrize("staleness", [0, 1])
def test_ctrl_c_ends_play_in_order_and_leaves_no_process(staleness: int, start: Start) -> None:
    process = start(0.0, staleness)
    wait_for(process, "in play")
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    rest, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 25
    assert process.returncode == 1
    assert "closing" in rest
    assert "Traceback" not in rest
    assert not [child for child in children if child.is_running()]


def test_a_second_ctrl_c_ends_at_once(start: Start) -> None:
    process = start(60.0, 0)
    wait_for(process, "in play")
    process.send_signal(signal.SIGINT)
    wait_for(process, "closing")
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    rest, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 25
    assert (process.returncode, "interrupted twice: ended at once" in rest) == (130, True)
