"""Ctrl-C, once and twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytestmark = pytest.mark.slow

GAME = """
import subprocess, sys, time
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
        print("closing", flush=True)
        time.sleep(self.closing_seconds)
"""


def start(folder: Path, config: dict[str, Any], closing_seconds: float, staleness: int) -> subprocess.Popen[str]:
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
def test_ctrl_c_ends_play_in_order_and_leaves_no_process(
    staleness: int, countdown: dict[str, Any], tmp_path: Path
) -> None:
    process = start(tmp_path, countdown, closing_seconds=0.0, staleness=staleness)
    wait_for(process, "in play")
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    rest, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == 1
    assert "closing" in rest
    assert "Traceback" not in rest
    assert not [child for child in children if child.is_running()]


def test_a_second_ctrl_c_ends_at_once(countdown: dict[str, Any], tmp_path: Path) -> None:
    process = start(tmp_path, countdown, closing_seconds=60.0, staleness=0)
    wait_for(process, "in play")
    process.send_signal(signal.SIGINT)
    wait_for(process, "closing")
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    rest, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 3
    assert (process.returncode, "interrupted twice: ended at once" in rest) == (130, True)
