"""What can go wrong, as a tree.

StepwiseError
├── ConfigError (also ValueError)      a setting that can never work: said before any time is spent
├── DataError (also ValueError)        a file of tasks that cannot be read: said with file and line
├── StoreError (also ValueError)       a run's store that cannot be read
├── CheckpointError (also OSError)     a checkpoint that cannot be written; those before it are as they were
└── EngineError (also RuntimeError)    the inference engine failed
    └── MismatchError                  it answers, but not as the policy that is trained

A wrong SQL statement is no error at all: it is a ``QueryResult`` and becomes the environment's next message.
"""

from __future__ import annotations


class StepwiseError(Exception):
    """Base of all errors raised on purpose. The command line prints its message as one line and exits with code 1."""


class ConfigError(StepwiseError, ValueError):
    """A setting that can never work. The message names the setting, its value and the way out."""


class DataError(StepwiseError, ValueError):
    """A file of tasks that cannot be read. The message names the file, the line and what is wrong with it."""


class StoreError(StepwiseError, ValueError):
    """A run whose store cannot be read. The message names the folder, what is wrong with it and the way out."""


class CheckpointError(StepwiseError, OSError):
    """A checkpoint that cannot be written. The message names the path, its size, what is free and what to do."""


class EngineError(StepwiseError, RuntimeError):
    """The engine failed. Closed and started again, it may work."""


class MismatchError(EngineError):
    """The engine's logprobs left the trainer's; starting it again would not help."""
