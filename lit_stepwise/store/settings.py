"""What a run keeps of its play, and how much."""

from __future__ import annotations

from dataclasses import dataclass

from lit_stepwise.errors import ConfigError


@dataclass(frozen=True)  # no slots: jsonargparse reads the defaults from __dict__
class Storage:
    """What of every turn is stored, and how much of it all."""

    token_ids: bool = True
    """The ids of each prompt and response; without them a stored turn cannot be scored again."""
    logprobs: bool = True
    """The engine's and the trainer's log-probability of each sampled token, and its advantage where tokens of a turn
    differ. How far engine and trainer are apart is stored per turn in any case."""
    max_text_chars: int | None = None
    """Longer prompts, responses and observations are cut; null stores them whole."""
    max_gib: float | None = None
    """Of a run's store; beyond it the oldest iterations of training are removed. Null keeps all."""

    def __post_init__(self) -> None:
        if self.max_text_chars is not None and self.max_text_chars < 1:
            raise ConfigError(
                f"rollout.store.max_text_chars={self.max_text_chars} leaves no text; use e.g. 2000, or null for all"
            )
        if self.max_gib is not None and not self.max_gib > 0:
            raise ConfigError(
                f"rollout.store.max_gib={self.max_gib} has no room for one iteration; use e.g. 10, or null to keep all"
            )
