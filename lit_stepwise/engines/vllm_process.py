"""What vLLM does to the process it lives in, and how the trainer gets its own back."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


@contextmanager
def undisturbed() -> Iterator[None]:
    """Give back what vLLM changes for the whole process."""
    environment, states = dict(os.environ), generators()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        vars(torch)["set_num_threads"] = set_num_threads  # vLLM puts a function there that does nothing
        torch.set_num_threads(num_threads)
        set_generators(states)


@contextmanager
def silenced() -> Iterator[None]:
    """Its imports use what torch is about to remove."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        yield


def set_environment(local: bool) -> None:
    """Set what vLLM reads from the environment. ``local``: the model is a folder on this machine."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it speaks before it reads the variable
    if local:
        os.environ["HF_HUB_OFFLINE"] = "1"  # asking the hub for a folder is retried for half a minute
    if dist.is_initialized():  # not every launcher sets these
        os.environ.setdefault("RANK", str(dist.get_rank()))
        os.environ.setdefault("WORLD_SIZE", str(dist.get_world_size()))
        os.environ.setdefault("LOCAL_RANK", _local_rank())


def _local_rank() -> str:
    """Of this process on its machine. For vLLM it is the number of the GPU, which the trainer has chosen already."""
    gpu = current_gpu()
    return str(gpu) if gpu >= 0 else os.environ.get("SLURM_LOCALID", os.environ["RANK"])


@contextmanager
def kept_process_group(keep: bool) -> Iterator[None]:
    """Shutting down, vLLM destroys the default process group, whoever made it; all of them may be gone already."""
    destroy = dist.destroy_process_group
    if keep:
        dist.destroy_process_group = lambda group=None: destroy(group) if group and dist.is_initialized() else None
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


def generators() -> tuple[Any, ...]:
    """States of all global generators: torch's on the CPU and on this GPU, Python's and numpy's."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def set_generators(states: tuple[Any, ...]) -> None:
    """Give them states that ``generators`` returned."""
    cpu, cuda, python, numpy = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    random.setstate(python)
    np.random.set_state(numpy)


def seed_generators(seed: int) -> None:
    """Seed them all with the same number."""
    torch.manual_seed(seed % 2**63)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def current_gpu() -> int:
    """The GPU this thread uses; -1 on a CPU. Another thread starts with the first one."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1  # type: ignore[no-untyped-call]


def finish_gpu_work() -> None:
    """Wait for what every thread asked of this GPU."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
