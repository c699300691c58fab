"""How long the phases of an iteration take at stated rates."""

from __future__ import annotations

from dataclasses import dataclass

from lit_stepwise.algo.flops import Flops, pairs_of
from lit_stepwise.planning.assumptions import Rates
from lit_stepwise.planning.iteration import Iteration
from lit_stepwise.planning.machine import GIB

TERA = 1e12


@dataclass(frozen=True, slots=True)
class Passes:
    """Over the tokens of an iteration, besides what an update is made of: one forward and two backward."""

    recomputed: bool
    """``model.activation_checkpointing``: another forward pass in each update."""
    old_logprobs: bool
    reference: bool


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one iteration."""

    sync: float
    decode: float
    prefill: float
    environment: float
    scoring: float
    """Old and reference log-probabilities."""
    update: float
    overlaps: bool
    """``rollout.staleness``: play and training work at the same time."""

    @property
    def play(self) -> float:
        """Engine and environment work at the same time; the engine's own two kinds of work do not."""
        return max(self.decode + self.prefill, self.environment)

    @property
    def total(self) -> float:
        """From one iteration to the next."""
        learning = self.scoring + self.update
        return self.sync + (max(self.play, learning) if self.overlaps else self.play + learning)


def seconds(
    iteration: Iteration,
    passes: Passes,
    num_passes: int,
    flops: Flops,
    sync_bytes: float,
    num_ranks: int,
    ranks_per_layer: int,
    num_engines: int,
    num_threads: int,
    rates: Rates,
    overlaps: bool,
) -> Seconds:
    """Of an iteration.

    Args:
        iteration: what it plays and trains.
        passes: what is computed besides.
        num_passes: times that each mini-batch is trained.
        flops: of a forward pass.
        sync_bytes: weights that travel to an engine.
        num_ranks: of the trainer, on each of which a part of an engine is.
        ranks_per_layer: of them that compute each layer together; what they exchange is taken for free.
        num_engines: each plays with as many threads of the environment.
        num_threads: of one engine.
        rates: assumed.
        overlaps: play runs ahead of training.
    """
    mean_prompt = iteration.prompt_tokens / max(iteration.num_turns, 1)
    read = flops(iteration.prompt_tokens, iteration.num_turns * pairs_of(round(mean_prompt)), 0)
    forward = iteration.flops / (rates.train_tflops * TERA * ranks_per_layer)
    return Seconds(
        sync=sync_bytes / (rates.sync_gib * GIB),
        decode=iteration.generated_tokens / (rates.decode_tokens * num_ranks),
        prefill=read / (rates.prefill_tflops * TERA * num_ranks),
        environment=iteration.num_turns * rates.environment_seconds / (num_threads * num_engines),
        scoring=forward * (passes.old_logprobs + passes.reference * num_passes),
        update=forward * (3 + passes.recomputed) * num_passes,
        overlaps=overlaps,
    )
