"""Fixtures that several rooms use."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_stepwise import cli
from lit_stepwise.testing import save_tiny_model
from tests.warm import WarmPython

ROOT = Path(__file__).parent.parent
SCRIPT = Path(sys.executable).with_name("lit-stepwise")

LEFT_BEHIND = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"}
"""Variables that Lightning sets where it launches, and takes for a launcher's where it finds them: with ``LOCAL_RANK``
the first rank starts no other and waits for them forever."""

Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure() -> None:
    """A suite in the background (``nohup``, ``&``) ignores Ctrl-C, and the programs that tests interrupt would, too."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests whose subject is a time limit get two more tries: a hang fails all three, a pause of the machine one."""
    for item in items:
        if item.get_closest_marker("clock"):
            item.add_marker(pytest.mark.flaky(reruns=2))


@pytest.fixture(autouse=True)
def environment_of_its_own() -> Iterator[None]:
    """What a fit in this process leaves in the environment is no other test's affair."""
    before = {name: value for name, value in os.environ.items() if name in LEFT_BEHIND}
    yield
    for name in LEFT_BEHIND:
        os.environ.pop(name, None)
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of two layers with a byte tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def countdown(tiny_model: Path) -> dict[str, Any]:
    """A whole configuration of the Countdown game; two optimizer steps an iteration."""
    return _countdown(tiny_model)


@pytest.fixture(scope="session")
def new_countdown(tiny_model: Path) -> Callable[[], dict[str, Any]]:
    """Makes such configurations."""
    return partial(_countdown, tiny_model)


def _countdown(model: Path) -> dict[str, Any]:
    checkpoint = {"every_n_train_steps": 1, "save_last": "link", "save_top_k": 1, "enable_version_counter": False}
    return {
        "model": {
            "model_path": str(model),
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {
            "source": {"class_path": "lit_stepwise.testing.CountdownTasks"},
            "train_files": "5",
            "val_files": "3",
            "test_files": "2",
            "tasks_per_iteration": 2,
            "mini_batches": 2,
        },
        "rollout": {
            "engine": {"class_path": "lit_stepwise.engines.TransformersEngine"},
            "environment": {"class_path": "lit_stepwise.testing.Countdown"},
            "advantage": {"class_path": "lit_stepwise.algo.TurnReturn"},
            "samples_per_task": 4,
            "deterministic": True,
            "limits": {"max_prompt_tokens": 100, "max_context_tokens": 200, "max_new_tokens": 8, "max_turns": 3},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 3,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": -1,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "default_root_dir": "runs",
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint}],
        },
    }


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """The same in this process, which saves the imports: gives (exit code, stderr)."""

    def run_it(command: str, config: dict[str, Any], *words: str) -> tuple[Any, str]:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of jsonargparse
        monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning logs to the stderr of an earlier test
        monkeypatch.setattr(sys, "argv", ["lit-stepwise", command, "--config", str(path), *words])
        try:
            code: Any = cli.main()
        except SystemExit as ended:
            code = ended.code
        return code, capfd.readouterr().err

    return run_it


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmPython]:
    """Starts scripts without the seconds of their imports."""
    python = WarmPython(_environment())
    yield python
    python.close()


@pytest.fixture
def run(run_in: Run, tmp_path: Path) -> Run:
    """Run the console script in ``tmp_path``; a dict becomes ``--config``."""
    return partial(run_in, tmp_path)


@pytest.fixture(scope="session")
def run_in(warm: WarmPython, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same in a folder that is given first."""
    return partial(_run_in, warm, tmp_path_factory.mktemp("said"))


def _run_in(
    warm: WarmPython, said: Path, folder: Path, command: str, config: dict[str, Any] | None = None, *words: str
) -> subprocess.CompletedProcess[str]:
    arguments = [command]
    if config is not None:
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        arguments += ["--config", str(path)]
    arguments += words
    out, err = said / "out", said / "err"
    for file in (out, err):
        file.write_text("")
    process = warm.start(SCRIPT, arguments, folder, _environment(), out, err)
    (code,) = warm.wait([process], 500)
    return subprocess.CompletedProcess([str(SCRIPT), *arguments], code, out.read_text(), err.read_text())


@pytest.fixture(scope="session")
def run_ranks(warm: WarmPython) -> Callable[..., None]:
    """Runs a test's file once for each rank, ``python FILE RANK WORDS...``, and expects these exit codes."""
    return partial(_run_ranks, warm)


def _run_ranks(warm: WarmPython, file: str, folder: Path, *words: str, codes: Sequence[int] = (0, 0)) -> None:
    logs = [folder / f"{'-'.join([Path(file).stem, *words])}-{rank}.log" for rank in range(len(codes))]
    ranks = [
        warm.start(Path(file), [str(rank), *words, str(folder)], ROOT, _environment(), log, log)
        for rank, log in enumerate(logs)
    ]
    assert warm.wait(ranks, 500) == list(codes), "\n".join(log.read_text()[-3000:] for log in logs)


def _environment() -> dict[str, str]:
    """For a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name not in LEFT_BEHIND}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
