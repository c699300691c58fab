"""What is measured of play: of its trajectories, its time, and the age of the weights that played."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn
from torchmetrics import MaxMetric, MeanMetric, SumMetric

from lit_stepwise.training.aggregates import Aggregates
from lit_stepwise.types import Rollout, StopReason, Trajectory, Turn


class TrajectoryMetrics(nn.Module):
    """Of trajectories.

    ``reward``, its components ``reward_<name>``, ``accuracy`` and ``turns`` are means over those that did not fail;
    ``format_errors``, ``response_tokens`` and ``prefix_continuity`` over their turns; ``failed`` and
    ``stopped_<reason>`` fractions of all trajectories, which add up to 1.
    """

    def __init__(self) -> None:
        super().__init__()
        reasons = [f"stopped_{reason.value}" for reason in StopReason if reason is not StopReason.FAILED]
        names = ("reward", "accuracy", "turns", "format_errors", "response_tokens", "failed", *reasons)
        self.means = Aggregates(MeanMetric, *names)

    def update(self, trajectories: Sequence[Trajectory]) -> None:
        """Take in what this rank played."""
        sound = [trajectory for trajectory in trajectories if not trajectory.failed]
        turns = [turn for trajectory in sound for turn in trajectory.turns]
        values: dict[str, list[float]] = {
            "reward": [trajectory.reward for trajectory in sound],
            "accuracy": [trajectory.success for trajectory in sound],
            "turns": [len(trajectory.turns) for trajectory in sound],
            "format_errors": [turn.feedback.format_error for turn in turns],
            "response_tokens": [len(turn.response_ids) for turn in turns],
            "prefix_continuity": [continues for trajectory in sound for continues in _continuity(trajectory.turns)],
            "failed": [trajectory.failed for trajectory in trajectories],
        }
        for reason in (StopReason.DONE, StopReason.MAX_TURNS, StopReason.CONTEXT):
            values[f"stopped_{reason.value}"] = [trajectory.stop_reason is reason for trajectory in trajectories]
        for trajectory in sound:
            for name, reward in trajectory.reward_components.items():
                values.setdefault(f"reward_{name}", []).append(reward)
        for name, numbers in values.items():
            self.means.update(name, torch.tensor(numbers, dtype=torch.float32))

    def result(self, prefix: str) -> dict[str, float]:
        """``<prefix>/<name>`` over all ranks, then start afresh."""
        return self.means.result(f"{prefix}/")


class RolloutMetrics(nn.Module):
    """Of an iteration's play. Feed it this rank's rollout only."""

    def __init__(self) -> None:
        super().__init__()
        self.trajectories = TrajectoryMetrics()
        self.staleness = Staleness()
        self.seconds = Aggregates(MeanMetric, "play", "engine", "environment", "sync", "wait")
        self.idle = Aggregates(MeanMetric)
        self.tokens = Aggregates(SumMetric, "generated", "cached")
        self.environment = Aggregates(SumMetric)

    def update(
        self, rollout: Rollout, began: int, num_steps: int, max_age: int, phases: Mapping[str, float] | None = None
    ) -> None:
        """Take in what this rank played.

        Args:
            rollout: all play of the iteration.
            began: ``global_step`` when training of the iteration began.
            num_steps: optimizer steps of an iteration.
            max_age: of weights, in iterations; older ones are counted as of that age.
            phases: seconds by name of what else the trainer's time went into since it was given the iteration before.
        """
        self.trajectories.update(rollout.trajectories)
        self.staleness.update(rollout.trajectories, began, num_steps, max_age)
        for name in self.seconds.fixed:
            if (seconds := getattr(rollout, f"{name}_seconds")) is not None:
                self.seconds.update(name, seconds)
        for name, seconds in (phases or {}).items():
            self.seconds.update(name, seconds)
        if rollout.cycle_seconds > 0:
            self.idle.update("trainer", rollout.wait_seconds / rollout.cycle_seconds)
        if rollout.busy_seconds is not None:
            self.idle.update("engine", 1 - rollout.busy_seconds / rollout.cycle_seconds)
        self.tokens.update("generated", rollout.num_generated_tokens)
        self.tokens.update("cached", rollout.num_cached_tokens)
        for name, amount in rollout.environment_stats.items():
            self.environment.update(name, amount)

    def result(self) -> dict[str, float]:
        """Over all ranks, then start afresh.

        ``rollout/<name>``, ``seconds/<phase>``, ``idle/<who>``, ``tokens/<kind>`` and ``environment/<count>``.
        """
        return {
            **self.trajectories.result("rollout"),
            **self.staleness.result("rollout"),
            **self.seconds.result("seconds/"),
            **self.idle.result("idle/"),
            **self.tokens.result("tokens/"),
            **self.environment.result("environment/"),
        }


class Staleness(nn.Module):
    """How old the weights were that sampled a token, when the iteration that it belongs to began training.

    ``staleness`` is the mean over tokens in optimizer steps, ``staleness_max`` the largest; ``stale_<n>`` the fraction
    of tokens that were n iterations old, a part of one counting as one. Weights of that very moment are 0 old.
    """

    def __init__(self) -> None:
        super().__init__()
        self.means = Aggregates(MeanMetric)
        self.largest = Aggregates(MaxMetric)

    def update(self, trajectories: Sequence[Trajectory], began: int, num_steps: int, max_age: int) -> None:
        """Take in what did not fail; the arguments are those of ``RolloutMetrics``."""
        turns = [turn for each in trajectories if not each.failed for turn in each.turns]
        spans = [span for turn in turns for span in turn.versions]
        steps = torch.tensor([began - span.policy_version for span in spans], dtype=torch.float32)
        num_tokens = torch.tensor([span.num_tokens for span in spans], dtype=torch.float32)
        ages = (steps / num_steps).ceil().clamp(max=max_age)
        self.means.update("staleness", steps, num_tokens)
        for age in range(max_age + 1):
            self.means.update(f"stale_{age}", (ages == age).float(), num_tokens)
        self.largest.update("staleness_max", steps[num_tokens > 0])

    def result(self, prefix: str) -> dict[str, float]:
        """``<prefix>/<name>`` over all ranks, then start afresh; nothing where nothing was sampled."""
        return self.means.result(f"{prefix}/") | self.largest.result(f"{prefix}/")


def _continuity(turns: Sequence[Turn]) -> list[bool]:
    """Of each turn after the first, whether its prompt begins with exactly what was read and sampled before."""
    found = []
    for before, turn in pairwise(turns):
        whole = [*before.prompt_ids, *before.response_ids]
        found.append(list(turn.prompt_ids[: len(whole)]) == whole)
    return found
