"""What a second Ctrl-C does."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher


def end_at_once_when_asked_again(trainer: Trainer) -> None:
    """Let a second Ctrl-C end this process and those it launched. Lightning would ignore it, however long that takes.

    Workers and servers see their pipes close, and end.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def end(number: int, frame: FrameType | None) -> None:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGKILL)
        sys.stderr.write("\ninterrupted twice: ended at once\n")
        os._exit(130)

    signal.signal(signal.SIGINT, end)
