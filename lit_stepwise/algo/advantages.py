"""Credit: how much better a turn was than its group."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import Advantage
from lit_stepwise.types import Trajectory

_EPSILON = 1e-6


@dataclass(frozen=True)
class GroupRelative(Advantage):
    """Group-relative outcome, the same for every turn of a trajectory (arXiv:2402.03300, section 4.1.2).

    ::

        A = (R - mean R) / (std R + 1e-6)      R = sum of turn rewards; mean, unbiased std over the group

    A group of one trajectory has nothing to compare with and keeps A = R.
    """

    norm_by_std: bool = True
    """False leaves the scale of the reward (arXiv:2503.20783, "Dr. GRPO")."""

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        """One advantage per trajectory, repeated over its turns."""
        advantages = [0.0] * len(trajectories)
        for members in _groups(trajectories):
            rewards = [trajectories[i].reward for i in members]
            if len(members) > 1:
                scale = _std(rewards) + _EPSILON if self.norm_by_std else 1.0
                mean = sum(rewards) / len(rewards)
                rewards = [(reward - mean) / scale for reward in rewards]
            for i, reward in zip(members, rewards, strict=True):
                advantages[i] = reward
        return [[advantages[i]] * len(trajectory.turns) for i, trajectory in enumerate(trajectories)]


@dataclass(frozen=True)
class TurnReturn(Advantage):
    """Discounted return-to-go of each turn against the group's mean at the same turn.

    ::

        G_t = r_t + discount G_{t+1}          A_t = (G_t - mean_i G_t^i) / (std_i G_0^i + 1e-6)

    A trajectory that has ended counts as G_t = 0 in the mean. Leaving it out instead would weigh turns by how many
    trajectories survive, which the policy itself controls, and would teach a lone survivor nothing. One scale for all
    turns of a group keeps their proportions. A group of one trajectory keeps A_t = G_t.
    """

    discount: float = 1.0
    """Weight of the next turn's return; below 1 an early right answer is worth more than a late one."""
    norm_by_std: bool = True
    """Divide by the group's unbiased std of G_0."""

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1:
            raise ConfigError(f"advantage.discount={self.discount} is outside [0, 1]; use 1 for the plain sum")

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[list[float]]:
        """One advantage per turn."""
        returns = [self._returns(trajectory) for trajectory in trajectories]
        advantages: list[list[float]] = [list(values) for values in returns]
        for members in _groups(trajectories):
            if len(members) == 1:
                continue
            firsts = [returns[i][0] if returns[i] else 0.0 for i in members]
            scale = _std(firsts) + _EPSILON if self.norm_by_std else 1.0
            for turn in range(max(len(returns[i]) for i in members)):
                alive = [i for i in members if turn < len(returns[i])]
                mean = sum(returns[i][turn] for i in alive) / len(members)
                for i in alive:
                    advantages[i][turn] = (returns[i][turn] - mean) / scale
        return advantages

    def _returns(self, trajectory: Trajectory) -> list[float]:
        values, following = [], 0.0
        for turn in reversed(trajectory.turns):
            following = turn.reward + self.discount * following
            values.append(following)
        return values[::-1]


def _groups(trajectories: Sequence[Trajectory]) -> list[list[int]]:
    """Positions of the trajectories of each group."""
    members: dict[int, list[int]] = defaultdict(list)
    for i, trajectory in enumerate(trajectories):
        members[trajectory.group].append(i)
    return list(members.values())


def _std(values: Sequence[float]) -> float:
    """Unbiased standard deviation of two or more values."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
