"""What an optimizer step minimises, per sampled token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lit_stepwise.algo.correction import RolloutCorrection
from lit_stepwise.algo.kl import KLPenalty
from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import PolicyLoss
from lit_stepwise.types import MicroBatch

OldLogprobs = Literal["rollout", "trainer"]
"""What the ratios of the loss are against."""


def chosen(
    old_logprobs: OldLogprobs | None, correction: RolloutCorrection | None, staleness: int
) -> tuple[OldLogprobs, RolloutCorrection]:
    """Both with a choice in the place of None.

    On-policy the engine's logprobs serve, and nothing is corrected. Where play runs ahead by ``staleness`` iterations,
    the ratios are against the trainer's own, and the weights of a correction make up for what the policy moved since.
    A correction asks for the trainer's in any case.
    """
    if old_logprobs is None:
        asks_trainer = staleness > 0 or correction not in (None, RolloutCorrection())
        old_logprobs = "trainer" if asks_trainer else "rollout"
    if correction is None:
        capped = staleness > 0 and old_logprobs == "trainer"
        correction = RolloutCorrection(token_cap=2.0) if capped else RolloutCorrection()
    return old_logprobs, correction


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """What the objective says of N sampled tokens."""

    losses: Tensor
    """[N] With gradient, before any weight of a reduction."""
    logged: Mapping[str, Tensor]
    """What is logged as ``train/<name>``, a mean over the tokens that are in it."""
    differences: Tensor
    """[n] Of the logprobs, trainer minus engine, where they are finite numbers."""


@dataclass(frozen=True)
class Objective:
    """The policy loss and what is added to it.

    ::

        w loss + kl.coefficient x estimate - entropy_bonus x entropy

    at each token, where w is the weight of the correction. A token that the correction masks, or one of whose logprobs
    is not a finite number, adds nothing.
    """

    loss: PolicyLoss
    kl: KLPenalty
    entropy_bonus: float
    old_logprobs: OldLogprobs
    correction: RolloutCorrection

    def __post_init__(self) -> None:
        if not 0 <= self.entropy_bonus < math.inf:
            raise ConfigError(
                f"model.entropy_bonus={self.entropy_bonus} is not 0 or more; use 0 for none, or e.g. 0.001"
            )
        if self.old_logprobs not in ("rollout", "trainer"):
            raise ConfigError(f"model.old_logprobs={self.old_logprobs!r} is unknown; use 'rollout' or 'trainer'")
        if self.old_logprobs == "rollout" and self.correction != RolloutCorrection():
            raise ConfigError(
                f"model.correction={self.correction} weighs the trainer's logprobs against the engine's, but with "
                "model.old_logprobs='rollout' both are the engine's; use model.old_logprobs='trainer'"
            )

    @property
    def asks_reference(self) -> bool:
        """Whether each update needs the reference's logprobs."""
        return self.kl.needs_reference and self.kl.place == "loss"

    def __call__(
        self, batch: MicroBatch, logprobs: Tensor, entropies: Tensor, ref_logprobs: Tensor | None
    ) -> TokenLosses:
        """All tensors are [N]; ``ref_logprobs`` only where the objective ``asks_reference``."""
        finite = logprobs.isfinite() if ref_logprobs is None else (logprobs + ref_logprobs).isfinite()
        corrected = self.correction(batch.old_logprobs, batch.rollout_logprobs, finite, batch.turns)
        kept = corrected.mask
        output = self.loss(logprobs, batch.old_logprobs, batch.advantages, kept, batch.turns)
        losses = corrected.weights * output.losses
        fractions = {**output.fractions, **corrected.fractions}
        fractions["non_finite"] = fractions["non_finite"] | ~finite
        finite = ~fractions["non_finite"]
        logged = {f"{name}_fraction": values for name, values in fractions.items()}
        logged["entropy"] = entropies[finite]
        if self.old_logprobs == "trainer":
            logged["old_logprob_gap"] = (batch.old_logprobs - batch.rollout_logprobs).abs()[finite]
        if ref_logprobs is not None:
            losses = losses + self.kl.penalty(logprobs, ref_logprobs, kept)
            logged["kl"] = self.kl.estimate(logprobs, ref_logprobs)[finite]
        if self.entropy_bonus:
            losses = losses - self.entropy_bonus * entropies.where(kept, 0.0)
        differences = (logprobs - batch.rollout_logprobs).detach()[finite]
        return TokenLosses(losses, {name: values.detach() for name, values in logged.items()}, differences)
