"""Ranks that are not there, tensors that hold nothing, and a Trainer that says nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from lit_stepwise.types import MicroBatch, TokenTree

Held = TypeVar("Held", MicroBatch, TokenTree)


@contextmanager
def fake_ranks(num_ranks: int) -> Iterator[None]:
    """This process is the first of so many, and what the others would send is never looked at."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("planning makes a process group of its own, and there is one already")
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def fake_tensors() -> Any:
    """Within it all new tensors hold nothing. What is computed of real ones alone is real, as places in a mesh."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    class Mode(FakeTensorMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            if given and not any(isinstance(each, FakeTensor) for each in given):
                return func(*args, **kwargs or {})
            return super().__torch_dispatch__(func, types, args, kwargs)

    return Mode(allow_non_fake_inputs=True)


def fake_batch(batch: MicroBatch, mode: Any) -> MicroBatch:
    """Micro-batch and tree with tensors that hold nothing."""
    return _faked(replace(batch, tree=_faked(batch.tree, mode)), mode)


def _faked(holder: Held, mode: Any) -> Held:
    """A frozen dataclass with fake tensors in the place of its own."""
    values = {each.name: getattr(holder, each.name) for each in fields(holder)}
    return replace(
        holder, **{name: mode.from_tensor(each) for name, each in values.items() if isinstance(each, Tensor)}
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says of the machine that plans."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
