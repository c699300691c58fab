"""The command ``lit-stepwise serve``: a vLLM server for ``VLLMServerEngine``."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from lit_stepwise.engines.server.process import (
    ServerProcess,
    check_installed,
    check_model_path,
    expect_running,
    wait_until_ready,
)


def serve(
    model_path: str,
    port: int = 8000,
    host: str = "127.0.0.1",
    max_context_tokens: int = 2048,
    dtype: str = "auto",
    tensor_parallel_size: int = 1,
    weights_backend: Literal["file", "nccl"] = "file",
    server_kwargs: dict[str, Any] | None = None,
    log: Path | None = None,
    start_seconds: float = 600.0,
) -> None:
    """Serve a model until Ctrl-C, to be named in ``rollout.engine.init_args.urls``.

    Whoever reaches the port rules the server, its weights included: open it to a network that you trust alone.

    Args:
        model_path: Folder or name of the Hugging Face model, the one of ``model.model_path``.
        port: To listen at.
        host: Address to listen at; 0.0.0.0 for trainers on other machines.
        max_context_tokens: Prompt and response of any turn; at least ``rollout.limits.max_context_tokens``.
        dtype: Of weights and cache. ``auto`` is float32 on a CPU and for float32 checkpoints; else the checkpoint's.
        tensor_parallel_size: GPUs that the server spans.
        weights_backend: How new weights come: ``file`` through a folder shared with the trainer, or ``nccl``.
        server_kwargs: More settings of vLLM; they win.
        log: File for its log; by default the log goes to the terminal.
        start_seconds: In which it has to come up.
    """
    check_installed()
    check_model_path(model_path)
    settings = {
        "model_path": model_path,
        "max_context_tokens": max_context_tokens,
        "dtype": dtype,
        "weights_backend": weights_backend,
        "server_kwargs": {"tensor_parallel_size": tensor_parallel_size, **(server_kwargs or {})},
        "address": {"host": host, "port": port},
    }
    reached = socket.gethostname() if host == "0.0.0.0" else host
    before = signal.signal(signal.SIGTERM, _interrupt)
    process = ServerProcess(settings, log=log, in_terminal=log is None)
    try:
        wait_until_ready([process], start_seconds)
        print(f"ready: http://{reached}:{port} serves {model_path}; Ctrl-C ends it", flush=True)
        while True:
            expect_running([process])
            time.sleep(1)
    except KeyboardInterrupt:
        print("ending", flush=True)
    finally:
        process.close()
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
