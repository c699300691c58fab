"""Two machines, as far as one can be two: launches of their own, and networks and shared memory of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from reading import differing, metrics, played

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Machines:
    """How to start a command on each of two."""

    prefixes: Sequence[Sequence[str]]
    address: str
    """Of the first."""
    interface: str


@pytest.fixture(params=["one network", "a network each"])
def machines(request: pytest.FixtureRequest) -> Iterator[Machines]:
    if request.param == "one network":
        yield Machines([[], []], "127.0.0.1", "lo")
        return
    names = [f"lit-stepwise-{os.getpid()}-{k}" for k in range(2)]
    if shutil.which("ip") is None or any(ip("netns", "add", name) for name in names):
        pytest.skip("needs the right to make network namespaces")
    try:
        ip("-n", names[0], "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", names[1])
        for k, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{k + 1}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
        own_memory = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        yield Machines(
            [["ip", "netns", "exec", name, "sh", "-c", own_memory, "sh"] for name in names], "10.77.0.1", "wire"
        )
    finally:
        for name in names:
            ip("netns", "delete", name)


def ip(*words: str) -> int:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode


def together(
    commands: Sequence[Sequence[str]], folder: Path, environment: Mapping[str, str], code: int = 0
) -> list[str]:
    """What each of them said; all have to end with ``code``."""
    logs = [(folder / f"machine-{k}.log").open("w+") for k in range(len(commands))]
    everything = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    processes = [
        subprocess.Popen(command, cwd=folder, env=everything, stdout=log, stderr=log, start_new_session=True)
        for command, log in zip(commands, logs, strict=True)
    ]
    try:
        codes = [process.wait(timeout=500) for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        said = []
        for log in logs:
            log.seek(0)
            said.append(log.read())
            log.close()
    assert codes == [code] * len(commands), "\n".join(said)
    return said


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def torchrun(machines: Machines, words: Sequence[str], folder: Path) -> list[str]:
    meeting = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", machines.address]
    port = str(free_port())
    commands = [
        [*prefix, str(BIN / "torchrun"), *meeting, "--master_port", port, "--node_rank", str(k), *words]
        for k, prefix in enumerate(machines.prefixes)
    ]
    return together(commands, folder, {"GLOO_SOCKET_IFNAME": machines.interface})


def test_two_machines_play_and_learn_like_one_process(
    machines: Machines, countdown: dict[str, Any], main: Any, tmp_path: Path
) -> None:
    code, stderr = main("fit", countdown, "--trainer.default_root_dir", "one")
    assert code == 0, stderr
    strategy = "ddp" if machines.interface == "lo" else "fsdp2"
    words = ["--trainer.num_nodes", "2", "--trainer.strategy", strategy, "--trainer.default_root_dir", "two"]
    torchrun(machines, [str(BIN / "lit-stepwise"), "fit", "--config", "config.yaml", *words], tmp_path)
    (alone,), (both,) = tmp_path.glob("one/*"), tmp_path.glob("two/*")  # and no folder of the second machine's own
    assert played(both) == played(alone)
    assert len(metrics(alone)) == 7  # six of training, and what is evaluated after the last
    assert differing(alone, both) == {}
    saved = both / "checkpoints" / "last.ckpt"
    parts = sorted(path.name for path in saved.glob("*.distcp")) if saved.is_dir() else []
    assert parts == (["__0_0.distcp", "__1_0.distcp"] if strategy == "fsdp2" else [])


def test_machines_that_find_different_checkpoints_do_not_begin(
    countdown: dict[str, Any], main: Any, tmp_path: Path
) -> None:
    code, stderr = main("fit", countdown, "--trainer.default_root_dir", "disk-0")
    assert code == 0, stderr
    words = ["fit", "--config", "config.yaml", "--ckpt_path", "last", "--trainer.num_nodes", "2"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    place |= {"LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    command = [str(BIN / "lit-stepwise"), *words, "--trainer.strategy", "ddp", "--trainer.default_root_dir"]
    # folders that the other does not see
    commands = [["env", f"RANK={k}", f"GROUP_RANK={k}", *command, f"disk-{k}"] for k in range(2)]
    for said in together(commands, tmp_path, place, code=1):
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "rank 0 goes on from disk-0/" in line
        assert "last.ckpt, and rank 1 goes on from none; " in line


SRUN = """#!/usr/bin/env bash
# starts what it is to, once for each place, as srun does
while [[ $1 == --* ]]; do shift; done
for node in $(seq 0 $((SLURM_NNODES - 1))); do
  for place in $(seq 0 $((SLURM_NTASKS_PER_NODE - 1))); do
    SLURM_PROCID=$((node * SLURM_NTASKS_PER_NODE + place)) SLURM_NODEID=$node SLURM_LOCALID=$place "$@" &
    tasks+=($!)
  done
done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit ${code:-0}
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two machines with one task each, and commands that stand in for SLURM's."""
    folder = tmp_path / "bin"
    for name, script in {
        "srun": SRUN,
        "scontrol": '#!/bin/sh\n[ "$1" = requeue ] && echo "$@" > asked.txt || printf "node-a\\nnode-b\\n"\n',
    }.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    job = {"JOB_ID": f"7{os.getpid() % 10000:04}", "JOB_NAME": "test", "NODELIST": "127.0.0.1", "NNODES": "2"}
    job |= {"NTASKS": "2", "NTASKS_PER_NODE": "1", "JOB_NODELIST": "node-[a-b]", "CPUS_PER_TASK": "1"}
    path = f"{folder}:{BIN}:{os.environ['PATH']}"
    return {"PATH": path, **{f"SLURM_{name}": value for name, value in job.items()}}


def test_the_batch_file_runs_on_two_machines_of_slurm_like_one_process(
    countdown: dict[str, Any], main: Any, slurm: dict[str, str], tmp_path: Path
) -> None:
    code, stderr = main("fit", countdown, "--trainer.default_root_dir", "one")
    assert code == 0, stderr
    words = ["--trainer.strategy", "fsdp2", "--trainer.default_root_dir", "two"]
    (said,) = together([["bash", str(ROOT / "configs/slurm/fit.sbatch"), "config.yaml", *words]], tmp_path, slurm)
    assert "SLURM auto-requeueing enabled" in said  # so it is Lightning's environment for SLURM
    assert "so this is a fresh start" in said
    assert played(tmp_path / "two/version_0") == played(tmp_path / "one/version_0")
    assert differing(tmp_path / "one/version_0", tmp_path / "two/version_0") == {}


def test_a_job_whose_time_is_up_asks_to_be_queued_again(slurm: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "bin/lit-stepwise"
    script.write_text('#!/bin/sh\necho "$@" > words-$SLURM_PROCID.txt; exec sleep 900\n')
    script.chmod(0o755)
    batch = subprocess.Popen(
        ["bash", str(ROOT / "configs/slurm/fit.sbatch"), "configs/qwen3.yaml", "--rollout.staleness", "1"],
        cwd=tmp_path, env={**os.environ, **slurm}, start_new_session=True,
    )  # fmt: skip
    try:
        while len(list(tmp_path.glob("words-?.txt"))) < 2:
            assert batch.poll() is None
        batch.send_signal(signal.SIGUSR1)
        assert batch.wait(timeout=120) != 0
    finally:
        os.killpg(batch.pid, signal.SIGKILL)
    assert (tmp_path / "asked.txt").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    expected = "--config configs/qwen3.yaml --ckpt_path last --trainer.num_nodes 2 --trainer.devices 1"
    assert (tmp_path / "words-1.txt").read_text() == f"fit {expected} --rollout.staleness 1\n"


def test_the_servers_of_a_job_are_named_in_a_page_for_the_run(slurm: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "bin/lit-stepwise"
    script.write_text('#!/bin/sh\necho "$@" > words-$SLURM_PROCID.txt\n')
    script.chmod(0o755)
    job = slurm | {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "4"}
    words = ["Qwen/Qwen3-4B", "shared", "32000", "--dtype", "bfloat16"]
    together([["bash", str(ROOT / "configs/slurm/servers.sbatch"), *words]], tmp_path, job)
    engine = yaml.safe_load((tmp_path / "shared/servers.yaml").read_text())["rollout"]["engine"]
    assert engine["class_path"] == "lit_stepwise.engines.VLLMServerEngine"
    assert engine["init_args"] == {
        "urls": ["http://node-a:8000", "http://node-a:8001", "http://node-b:8000", "http://node-b:8001"],
        "weights_folder": "shared",
    }
    asked = [(tmp_path / f"words-{rank}.txt").read_text() for rank in range(4)]
    rest = "--model_path Qwen/Qwen3-4B --host 0.0.0.0 --max_context_tokens 32000 --dtype bfloat16\n"
    assert asked == [f"serve --port {port} {rest}" for port in (8000, 8001, 8000, 8001)]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_a_batch_file_is_sound_and_asks_for_a_process_on_each_gpu(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    asked = dict(
        line.removeprefix("#SBATCH --").split("=", 1)
        for line in path.read_text().splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    assert asked["ntasks-per-node"] == "8"
    assert asked.get("gpus-per-node") == "8" or asked.get("gpus-per-task") == "1"
