"""Memory as torch's trackers see it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_stepwise.training.sharding import local


def tracker_of(policy: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Knows what is there already, and is a context that sees what comes and goes."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed.fsdp import FSDPModule

    if isinstance(policy, FSDPModule):
        return FSDPMemTracker(policy, optimizer)

    class Tracker(MemTracker):  # type: ignore[no-untyped-call]
        def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> Any:
            # the hooks tell gradients from the rest, which are known here, and fail on frozen parameters
            return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

    tracker = Tracker()
    tracker.track_external(policy, optimizer)
    return tracker


class GlooCopies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within a tracker: takes what gloo, which ranks on CPUs talk through, takes for as long as a collective runs.

    To gather, it receives into memory of its own, as much as the output; to sum and scatter, it sums in a copy of the
    input. ``ProcessGroupGloo`` does both below of what a tracker sees.
    """

    def __init__(self, tracker: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracker = tracker
        self._last_peak = self._of_last_peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The same, beside a copy that nobody reads."""
        copied = {torch.ops.c10d._allgather_base_.default: 0, torch.ops.c10d._reduce_scatter_base_.default: 1}
        if func not in copied:
            return func(*args, **kwargs or {})
        before, copy = self._peak(), torch.empty_like(args[copied[func]])
        result = func(*args, **kwargs or {})
        if self._peak() > before:
            self._last_peak, self._of_last_peak = self._peak(), bytes_of([copy])
        return result

    @property
    def at_peak(self) -> int:
        """Bytes that it had taken when the tracker saw the most."""
        return self._of_last_peak if self._peak() == self._last_peak else 0

    def _peak(self) -> int:
        return peak_of(self._tracker)["Total"]


def peak_of(tracker: Any) -> dict[str, int]:
    """By torch's name of the part, and their ``Total``."""
    parts: dict[str, int] = {}
    for of_device in tracker.get_tracker_snapshot("peak").values():
        for name, size in of_device.items():
            key = name if isinstance(name, str) else name.value
            parts[key] = parts.get(key, 0) + size
    return parts


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of this rank."""
    own = {id(each): local(each) for each in tensors}
    return sum(each.numel() * each.itemsize for each in own.values())
