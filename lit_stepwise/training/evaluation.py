"""What is measured of validation and test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import comb

from torch import nn
from torchmetrics import MeanMetric

from lit_stepwise.training.aggregates import Aggregates
from lit_stepwise.training.play_metrics import TrajectoryMetrics
from lit_stepwise.types import Rollout, Trajectory


class EvaluationMetrics(nn.Module):
    """Of the greedy attempts, or where there are none of those drawn at random; of the latter also pass@k.

    A greedy attempt is one of temperature 0. Feed it this rank's rollouts only, all attempts at a task together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trajectories = TrajectoryMetrics()
        self.pass_at = Aggregates(MeanMetric)
        self.seconds = Aggregates(MeanMetric, "evaluate")

    def update(self, rollout: Rollout) -> None:
        """Take in what this rank played."""
        greedy = [trajectory for trajectory in rollout.trajectories if trajectory.temperature == 0]
        drawn = [trajectory for trajectory in rollout.trajectories if trajectory.temperature > 0]
        self.trajectories.update(greedy or drawn)
        groups: dict[int, list[Trajectory]] = {}
        for trajectory in drawn:
            groups.setdefault(trajectory.group, []).append(trajectory)
        for attempts in groups.values():
            for k, value in pass_at(attempts).items():
                self.pass_at.update(f"pass_at_{k}", value)
        self.seconds.update("evaluate", rollout.wait_seconds)

    def result(self, prefix: str) -> dict[str, float]:
        """``<prefix>/<name>``, ``<prefix>/pass_at_<k>`` and ``seconds/evaluate`` over all ranks, then start afresh."""
        named = f"{prefix}/"
        return self.trajectories.result(prefix) | self.pass_at.result(named) | self.seconds.result("seconds/")


def pass_at(attempts: Sequence[Trajectory], ks: Iterable[int] | None = None) -> dict[int, float]:
    """pass@k at one task, by k: those of ``ks``, or 1, 2, 4 ... and the number of attempts, failed ones included.

    ::

        1 - C(n - c, k) / C(n, k)          of n attempts that did not fail c succeeded

    the unbiased estimate of the chance that one of k attempts succeeds (arXiv:2107.03374, eq. 1). A k is left out for
    which too few attempts did not fail.
    """
    sound = [attempt for attempt in attempts if not attempt.failed]
    n, c = len(sound), sum(attempt.success for attempt in sound)
    if ks is None:
        ks = sorted({*(2**i for i in range(len(attempts).bit_length())), len(attempts)})
    return {k: 1 - comb(n - c, k) / comb(n, k) for k in ks if k <= n}
