import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import auto_cli

from lit_stepwise import serve
from lit_stepwise.engines.server import supervisor
from lit_stepwise.engines.server.main import flags, server_settings
from lit_stepwise.engines.server.process import ServerProcess, expect_running, wait_until_ready
from lit_stepwise.errors import EngineError
from tests.waiting import wait_until

pytestmark = pytest.mark.clock


def test_a_server_is_started_with_what_the_engine_needs() -> None:
    settings = {
        "model_path": "/m",
        "address": {"uds": "/s"},
        "max_context_tokens": 3000,
        "weights_backend": "nccl",
        "server_kwargs": {"max_num_seqs": 7, "enable_prefix_caching": False, "enforce_eager": False},
    }
    on_gpu = flags(server_settings(settings, cpu=False, dtype="bfloat16"))
    text = " ".join(on_gpu)
    assert "--model /m --uds /s --max-model-len 3000 --dtype bfloat16 --logprobs-mode processed_logprobs" in text
    assert '--weight-transfer-config {"backend": "nccl"}' in text
    assert text.endswith("--max-num-seqs 7 --no-enable-prefix-caching --no-enforce-eager")
    assert "chunked" not in text
    on_cpu = " ".join(flags(server_settings(settings, cpu=True, dtype="float32")))
    assert "--no-enable-chunked-prefill --max-num-batched-tokens 3000" in on_cpu
    assert on_cpu.count("enforce-eager") == 1


def test_a_process_that_dies_is_named_with_the_errors_of_its_log() -> None:
    process = ServerProcess({"model_path": "m"})
    folder = process.url.removeprefix("unix:").removesuffix("/socket")
    try:
        with pytest.raises(
            EngineError, match=r"(?s)vLLM server unix:.*exit code 1; its log ends with\n.*KeyError: 'dtype'"
        ):
            wait_until_ready([process], 60)
        with pytest.raises(EngineError, match="exit code 1"):
            expect_running([process])
    finally:
        process.close()
    process.close()
    assert not Path(folder).exists()
    with pytest.raises(EngineError, match=r"nothing can listen at host=256\.0\.0\.1 port=1"):
        ServerProcess({"model_path": "m", "address": {"host": "256.0.0.1", "port": 1}})


def state_of(process: int) -> tuple[str, int]:
    """State and parent; a dead one that nobody has asked about is as good as gone."""
    try:
        state, parent, *_ = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return "gone", 0
    return "gone" if state == "Z" else state, int(parent)


DEAF_GRANDCHILD = """sh -c 'trap "" TERM; while :; do sleep 0.1; done' & echo $!; wait"""


@pytest.mark.parametrize("victim", ["parent", "command", "supervisor"])
def test_nothing_of_a_command_outlives_it_or_who_asked_for_it(victim: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    supervised = f"{sys.executable!r}, '-I', '-S', {supervisor.__file__!r}, str(os.getpid()), {str(folder)!r}"
    code = (
        "import os, subprocess, time; "
        f"subprocess.Popen([{supervised}, 'sh', '-c', {DEAF_GRANDCHILD!r}]); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        grandchild = int(parent.stdout.readline())
        command = state_of(grandchild)[1]
        minder = state_of(command)[1]
        try:
            os.kill({"parent": parent.pid, "command": command, "supervisor": minder}[victim], signal.SIGKILL)
            wait_until(lambda: state_of(command)[0] == "gone")
            if victim != "supervisor":  # which is all that can see to more than that the command is asked to end
                wait_until(lambda: state_of(minder)[0] == state_of(grandchild)[0] == "gone")
                assert not folder.exists()
        finally:
            for each in (minder, command, grandchild, parent.pid):
                with suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)


def test_serving_says_where_and_ends_its_server_when_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Any] = []

    class Process:
        url = "http://0.0.0.0:8123"

        def __init__(self, settings: Any, log: Path | None, in_terminal: bool) -> None:
            self.settings, self.in_terminal, self.closed = settings, in_terminal, False
            made.append(self)

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(serve, "ServerProcess", Process)
    monkeypatch.setattr(serve, "check_installed", lambda: None)
    monkeypatch.setattr(serve, "wait_until_ready", lambda processes, seconds: None)
    monkeypatch.setattr(serve, "expect_running", lambda processes: os.kill(os.getpid(), signal.SIGTERM))
    words = ["--model_path", str(tmp_path), "--port", "8123", "--host", "0.0.0.0", "--tensor_parallel_size", "2"]
    before = signal.getsignal(signal.SIGTERM)
    auto_cli(serve.serve, args=[*words, "--server_kwargs", "{max_num_seqs: 9}"], as_positional=False)
    assert signal.getsignal(signal.SIGTERM) is before
    assert made[0].closed
    assert made[0].in_terminal
    assert made[0].settings["address"] == {"host": "0.0.0.0", "port": 8123}
    assert made[0].settings["server_kwargs"] == {"tensor_parallel_size": 2, "max_num_seqs": 9}
    assert f"ready: http://{socket.gethostname()}:8123 serves {tmp_path}" in capsys.readouterr().out
