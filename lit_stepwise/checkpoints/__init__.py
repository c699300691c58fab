"""Checkpoints that are whole or not there: how they are written, found and read."""

from lit_stepwise.checkpoints.plugins import AsyncCheckpointIO, AtomicCheckpointIO

__all__ = ["AsyncCheckpointIO", "AtomicCheckpointIO"]
