"""Begin with tasks of short prompts, and let longer ones in little by little.

trainer:
  callbacks:
    - class_path: callbacks.prompt_warmup.PromptWarmup
      init_args: {first_share: 0.25, num_iterations: 20}
"""

from __future__ import annotations

from math import ceil

import lightning.pytorch as pl

from lit_stepwise.errors import ConfigError
from lit_stepwise.types import Deal


class PromptWarmup(pl.Callback):
    """Deals out only the tasks with the shortest first prompts; their share of all tasks grows linearly to 1.

    Early iterations are then cheap, which is when a policy learns the protocol. Everything is a function of the
    iteration: there is no state, and it is as right with ``rollout.staleness`` as without. While a share holds fewer
    tasks than an iteration plays, some are played twice.

    Args:
        first_share: of the tasks, in iteration 0; tasks as long as the longest of them are in, too.
        num_iterations: after so many all tasks are played.
    """

    def __init__(self, first_share: float = 0.25, num_iterations: int = 20) -> None:
        if not 0 < first_share <= 1:
            raise ConfigError(f"PromptWarmup first_share={first_share} is not in (0, 1]; use e.g. 0.25")
        if num_iterations < 1:
            raise ConfigError(f"PromptWarmup num_iterations={num_iterations}; use 1 or more")
        self.first_share = first_share
        self.num_iterations = num_iterations

    def on_deal(self, deal: Deal) -> None:
        """Called alike on every rank, with a list that other callbacks may have changed."""
        longest = self.longest(deal.iteration, sorted(deal.prompt_tokens))
        deal.weights = [
            weight if num_tokens <= longest else 0.0
            for weight, num_tokens in zip(deal.weights, deal.prompt_tokens, strict=True)
        ]

    def longest(self, iteration: int, prompt_tokens: list[int]) -> int:
        """Tokens of the longest prompt that is played in ``iteration``, of all their numbers in order."""
        grown = min(iteration / self.num_iterations, 1.0)
        share = self.first_share + (1 - self.first_share) * grown
        return prompt_tokens[ceil(share * len(prompt_tokens)) - 1]
