"""The machine that a configuration is for, which need not be the one that plans."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lit_stepwise.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Machine:
    """Equal nodes with equal devices."""

    kind: Literal["gpu", "cpu"]
    num_devices: int
    """Of one node; processes, where ``kind`` is cpu."""
    num_nodes: int
    memory: float
    """Bytes of one GPU, or of all the CPUs of a node."""
    memory_source: str
    """Where that figure comes from."""

    @property
    def num_ranks(self) -> int:
        """Processes of the trainer."""
        return self.num_devices * self.num_nodes

    @property
    def memory_per_rank(self) -> float:
        """What a rank may take: a GPU, or its share of the memory of a node."""
        return self.memory if self.kind == "gpu" else self.memory / self.num_devices

    @classmethod
    def of(cls, trainer: Any, gpu_memory_gib: float | None) -> Machine:
        """That of the section ``trainer``."""
        kind = _kind(trainer.accelerator)
        devices = _num_devices(trainer.devices, kind)
        if kind == "cpu":
            pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            return cls("cpu", devices, trainer.num_nodes, pages, "the memory of this machine")
        if gpu_memory_gib is not None:
            if not gpu_memory_gib > 0:
                raise ConfigError(f"--gpu_memory_gib {gpu_memory_gib} is no memory; give that of one GPU, such as 80")
            return cls("gpu", devices, trainer.num_nodes, gpu_memory_gib * GIB, "--gpu_memory_gib")
        if torch.cuda.is_available():
            found = torch.cuda.get_device_properties(0)
            return cls("gpu", devices, trainer.num_nodes, found.total_memory, f"the {found.name} of this machine")
        return cls(
            "gpu", devices, trainer.num_nodes, 80 * GIB, "assumed, since this machine has no GPU; --gpu_memory_gib"
        )


def _kind(accelerator: Any) -> Literal["gpu", "cpu"]:
    if accelerator == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    if accelerator in ("gpu", "cuda"):
        return "gpu"
    if accelerator == "cpu":
        return "cpu"
    raise ConfigError(f"trainer.accelerator={accelerator} is none that plan knows; use gpu or cpu")


def _num_devices(devices: Any, kind: str) -> int:
    if isinstance(devices, list):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        return max(torch.cuda.device_count(), 1) if kind == "gpu" else 1
    if str(devices).isdigit() and int(devices) > 0:
        return int(devices)
    raise ConfigError(f"trainer.devices={devices} is no number that plan can read; use e.g. 8")
