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
    asked, bell = os.pipe()
    os.set_blocking(bell, False)

    def end(number: int, frame: FrameType | None) -> None:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGKILL)
        sys.stderr.write("\ninterrupted twice: ended at once\n")
        os._exit(130)

    def listen() -> None:
        while os.read(asked, 1) != bytes([signal.SIGINT]):
            pass
        end(signal.SIGINT, None)

    # Python runs a handler in its main thread alone, which may stand in a sleep that no signal wakes (where the kernel
    # gave it to another thread) or in a collective that never ends; the bell rings in whatever thread is interrupted
    signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, end)
    threading.Thread(target=listen, name="second Ctrl-C", daemon=True).start()
