"""What nobody can know before a run. Each is an option with a default, and is printed."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lit_stepwise.errors import ConfigError


@dataclass(frozen=True)
class Assumptions:
    """Of play. Lengths are in tokens."""

    num_tasks: int = 1000
    """Training tasks, where their files are not there."""
    prompt_tokens: int | None = None
    """First prompts, where no task can be read; null is half of rollout.limits.max_prompt_tokens."""
    chars_per_token: float = 3.5
    """Of a prompt, where there is no tokenizer."""
    turns: float | None = None
    """Of a trajectory, in the mean; null is half way from one to rollout.limits.max_turns."""
    response_tokens: int | None = None
    """Of a turn, in the mean; null is a quarter of rollout.limits.max_new_tokens."""
    thought_fraction: float = 0.7
    """Of a response, what rollout.history=strip_think leaves out of later prompts."""
    observation_tokens: int = 300
    """What stands between two responses."""
    overhead_gib: float = 4.0
    """Of a GPU, what CUDA and NCCL take, and what the allocator leaves unused."""
    engine_overhead_gib: float = 4.0
    """Of the engine's share of a GPU, what is neither weights nor cache: activations, CUDA graphs."""
    engine_asleep_gib: float = 1.5
    """Of a GPU, what an engine keeps that sleeps."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and value < 0:
                raise ConfigError(f"--assume.{each.name}={value} is negative; use 0 or more")
        if not 0 <= self.thought_fraction <= 1 or not self.chars_per_token > 0:
            raise ConfigError(
                f"--assume.thought_fraction={self.thought_fraction} is a share, from 0 to 1, and "
                f"--assume.chars_per_token={self.chars_per_token} is above 0"
            )


@dataclass(frozen=True)
class Rates:
    """Of one GPU, or one process on CPUs. The defaults are guesses for an H100 in bfloat16, measured nowhere."""

    train_tflops: float = 350.0
    """Floating-point operations of an update in a second, in units of 1e12; about a third of what is on the box."""
    prefill_tflops: float = 350.0
    """The same of an engine that reads prompts."""
    decode_tokens: float = 2000.0
    """Tokens that an engine samples in a second, on each of its GPUs, for all its requests together."""
    environment_seconds: float = 0.5
    """Of one turn in one thread."""
    sync_gib: float = 10.0
    """Weights that reach the engine in a second."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if not getattr(self, each.name) > 0:
                raise ConfigError(f"--rates.{each.name}={getattr(self, each.name)} never ends; use more than 0")
