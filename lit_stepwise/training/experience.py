"""Where an iteration stands: the state machine that decides what is trained next.

Lightning's hooks differ after a resume (an epoch may start without ``on_train_epoch_start``), so nothing is derived
from them or from ``current_epoch``: whoever needs a mini-batch asks, and whoever has trained one says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch

from lit_stepwise.algo.microbatches import cut_at_groups
from lit_stepwise.types import MiniBatch, StepSample

Collect = Callable[[int], list[StepSample]]
"""Plays the iteration of that number."""


class Experience:
    """The step samples of the current iteration and how far they are used up.

    One iteration is always ``mini_batches x passes`` optimizer steps: Lightning fixes the length of an epoch once.
    """

    def __init__(self, mini_batches: int, passes: int) -> None:
        self.mini_batches = mini_batches
        self.passes = passes
        self.iteration = -1
        self.cursor = len(self)
        self.samples: Sequence[StepSample] = ()

    def __len__(self) -> int:
        return self.mini_batches * self.passes

    def ensure(self, collect: Collect) -> None:
        """Play the next iteration when this one is used up."""
        if self.cursor >= len(self):
            self.samples = collect(self.iteration + 1)
            self.iteration += 1
            self.cursor = 0

    def current(self) -> MiniBatch:
        """The mini-batch to train now."""
        parts = cut_at_groups(self.samples, self.mini_batches)
        pass_index, part = divmod(self.cursor, self.mini_batches)
        return MiniBatch(parts[part], self.iteration, self.cursor, pass_index)

    def advance(self) -> None:
        """The current mini-batch was trained."""
        self.cursor += 1

    def state_dict(self) -> dict[str, Any]:
        """Tensors and builtins only; the samples only while they are still needed."""
        needed = self.samples if self.cursor < len(self) else ()
        return {"iteration": self.iteration, "cursor": self.cursor, "samples": pack(needed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where ``state_dict`` was taken."""
        self.iteration, self.cursor, self.samples = state["iteration"], state["cursor"], unpack(state["samples"])


class ExperienceLoader:
    """The train dataloader: sized, so that Lightning never fetches ahead; lazy, so that ``iter()`` plays nothing."""

    def __init__(self, experience: Experience, collect: Collect) -> None:
        self.experience = experience
        self.collect = collect

    def __len__(self) -> int:
        return len(self.experience)

    def __iter__(self) -> Iterator[MiniBatch]:
        self.experience.ensure(self.collect)
        while self.experience.cursor < len(self.experience):
            position = self.experience.cursor
            yield self.experience.current()
            assert self.experience.cursor == position + 1, "the RolloutCallback must advance after every batch"

    def state_dict(self) -> dict[str, Any]:
        """Empty: the experience, which the data module saves, says where it goes on. Lightning warns of less."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""


_RAGGED = {
    "prompt_ids": torch.int32,
    "response_ids": torch.int32,
    "response_mask": torch.bool,
    "rollout_logprobs": torch.float64,
    "advantages": torch.float64,
    "old_logprobs": torch.float64,
}


def pack(samples: Sequence[StepSample]) -> dict[str, Any]:
    """Columns: per ragged field all values and the lengths, float64 so that every number survives to the last bit."""
    columns: dict[str, Any] = {}
    for field in fields(StepSample):
        values = [getattr(sample, field.name) for sample in samples]
        if field.name in _RAGGED:
            flat = [x for value in values for x in value]
            columns[field.name] = torch.tensor(flat, dtype=_RAGGED[field.name])
            columns[f"{field.name}_lengths"] = [len(value) for value in values]
        else:
            columns[field.name] = values
    return columns


def unpack(columns: dict[str, Any]) -> list[StepSample]:
    """The inverse of ``pack``."""
    rows: dict[str, list[Any]] = {}
    for field in fields(StepSample):
        values = columns[field.name]
        if field.name in _RAGGED:
            values = [part.tolist() for part in torch.split(values, columns[f"{field.name}_lengths"])]
        rows[field.name] = values
    return [StepSample(**dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
