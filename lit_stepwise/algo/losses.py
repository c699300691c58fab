"""Policy objectives, per response token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import PolicyLoss
from lit_stepwise.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

_MAX_LOG_RATIO = 20.0
"""exp of it is finite in float32; every objective is flat that far out."""


@dataclass(frozen=True)
class DualClip(PolicyLoss):
    """Clipped policy gradient with a floor for negative advantages (arXiv:1912.09729, eq. 5).

    ::

        A >= 0:       min(r A, clip(r, 1 - low, 1 + high) A)           r = exp(logprobs - old_logprobs)
        A <  0:   max(min(r A, clip(r, 1 - low, 1 + high) A), dual A)

    is maximised; the loss is its negative. ``high > low`` is "clip higher" (arXiv:2503.14476, section 3.1).
    """

    low: float = 0.2
    """Lower clip distance."""
    high: float = 0.28
    """Upper clip distance."""
    dual: float = 3.0
    """Ratio at which a bad action stops being pushed down."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < 1:
            raise ConfigError(f"loss.low={self.low} is outside [0, 1); use e.g. 0.2")
        if self.high < 0:
            raise ConfigError(f"loss.high={self.high} is negative; use e.g. 0.28")
        if self.dual <= 1 + self.high:
            raise ConfigError(f"loss.dual={self.dual} must exceed 1 + high = {1 + self.high}; use e.g. 3")

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> LossOutput:
        """All arguments are [N]; ``mask`` is True on tokens that count."""
        ratio = (logprobs - old_logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
        clipped = ratio.clamp(1 - self.low, 1 + self.high)
        objective = (ratio * advantages).minimum(clipped * advantages)
        bad = advantages < 0
        objective = objective.maximum(self.dual * advantages).where(bad, objective)
        good = advantages > 0
        return LossOutput(
            losses=(-objective).where(mask, 0.0),
            fractions={
                "clip_high": good & (ratio > 1 + self.high) & mask,
                "clip_low": bad & (ratio < 1 - self.low) & mask,
                "dual_clip": bad & (ratio > self.dual) & mask,
            },
        )
