"""What is measured of an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, SumMetric

from lit_stepwise.algo.flops import Flops, pairs_of
from lit_stepwise.algo.kl import KLPenalty
from lit_stepwise.training.aggregates import Aggregates
from lit_stepwise.types import MicroBatch


def gaps_of(differences: Tensor) -> dict[str, float]:
    """How far the trainer's logprobs are from the engine's; nothing without a token.

    ``logprob_gap``, its ``_p99`` (99 % of the tokens are at it or below) and ``_max`` are absolute, in nats;
    ``rollout_kl`` estimates KL(engine || trainer) from what the engine drew.

    Args:
        differences: [n] trainer minus engine.
    """
    if not len(differences):
        return {}
    differences = differences.cpu().double()
    gaps = differences.abs()
    return {
        "logprob_gap": float(gaps.mean()),
        "logprob_gap_p99": float(gaps.kthvalue(-(-99 * len(gaps) // 100)).values),
        "logprob_gap_max": float(gaps.max()),
        "rollout_kl": float(KLPenalty(estimator="k3").estimate(torch.zeros_like(gaps), differences).mean()),
    }


class UpdateMetrics(nn.Module):
    """Of one optimizer step: the loss, means over tokens, sums of tokens. Feed it this rank's micro-batches only."""

    copies: int
    """Ranks that are fed the same."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 1
        self.loss = SumMetric()
        self.means = Aggregates(MeanMetric)
        self.tokens = Aggregates(SumMetric, "trained", "forwarded", "saved")
        self.flops = Aggregates(SumMetric, "trained", "saved")
        # all are kept, for the percentile to be exact: four bytes a token, a few megabytes an optimizer step
        self.differences = CatMetric()

    def update(self, loss: Tensor, per_token: Mapping[str, Tensor], differences: Tensor) -> None:
        """Take in what the objective said of one micro-batch.

        Args:
            loss: its part of the mini-batch's.
            per_token: values by name, of all its tokens or of some.
            differences: [n] trainer minus engine, of the tokens of which both logprobs are finite.
        """
        self.loss.update(loss.detach())
        self.observe(per_token)
        self.differences.update(differences.detach().float())

    def count(self, batch: MicroBatch, num_forwarded: int, flops: Flops) -> None:
        """Take in what one micro-batch cost, and what it would have cost with each step sample by itself.

        Args:
            batch: what was forwarded.
            num_forwarded: tokens that the forward pass computed, padding included.
            flops: of a forward pass of the model; an update takes three times as many.
        """
        self.tokens.update("trained", len(batch.targets))
        self.tokens.update("forwarded", num_forwarded)
        self.tokens.update("saved", sum(batch.lengths) - num_forwarded)
        positions = batch.tree.positions
        packed = flops(len(positions), int(positions.sum()) + len(positions), len(batch.labels))
        apart = flops(sum(batch.lengths), sum(map(pairs_of, batch.lengths)), len(batch.targets))
        self.flops.update("trained", 3 * packed)
        self.flops.update("saved", 3 * (apart - packed))

    def observe(self, per_token: Mapping[str, Tensor]) -> None:
        """Take in values by name that come from elsewhere."""
        for name, values in per_token.items():
            self.means.update(name, values.detach().float())

    def logprob_gap(self) -> float:
        """Mean gap of engine and trainer so far, over all ranks, which call it together; 0 without a token."""
        return self._gaps().get("logprob_gap", 0.0)

    def result(self) -> dict[str, float]:
        """Over all ranks, then start afresh: ``train/<mean>``, ``train/<gap>``, ``tokens/<kind>``, ``flops/<kind>``.

        A mean is there if anything was said about it since the last step.
        """
        sums = {"train/loss": float(self.loss.compute())}
        sums |= self.tokens.result("tokens/") | self.flops.result("flops/")
        values = {name: value / self.copies for name, value in sums.items()}
        values |= {f"train/{name}": value for name, value in self._gaps().items()}
        values |= self.means.result("train/")
        self.loss.reset()
        self.differences.reset()
        return values

    def _gaps(self) -> dict[str, float]:
        # a list where there is no token, a scalar where there is one
        return gaps_of(torch.as_tensor(self.differences.compute()).flatten())
